"""Walks through the autograd graph, against graphs that are written down."""

import torch

from torch_klloss.numerics.graph import leaves_of, nodes_of


def test_nodes_are_yielded_once_and_none_behind_those_that_end_the_walk():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    product = a * b
    total = (product + product.exp()).sum()
    assert len(list(nodes_of(total))) == 6  # sum, add, exp, mul and two leaves
    reached = list(nodes_of(total, until={product.grad_fn}))
    assert len(reached) == 4
    assert product.grad_fn in reached
    assert not list(nodes_of(torch.ones(2), a))


def test_leaves_are_those_behind_the_tensors_and_the_tensors_that_are_leaves():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    found = list(leaves_of(a * b.exp(), c, torch.ones(2)))
    assert {id(leaf) for leaf in found} == {id(leaf) for leaf in (a, b, c)}
    assert len(found) == 3
