"""torch_klloss/auditing/training_step/gradient.py."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_klloss.auditing.training_step.pairs import Pair
from torch_klloss.auditing.training_step.record import Number
from torch_klloss.auditing.training_step.watcher import Watcher
from torch_klloss.closed_forms import kl_divergence
from torch_klloss.distributions.tensors import tensors_of

_GRADIENT_TOLERANCE = 1e-2  # far above rounding, far below a parameter's share
_SAMPLER = re.compile(r"sampl|repar|latent|(?:^|_)z(?:_|$)")


def nodes_of(*tensors: Tensor, without: frozenset[Any] = frozenset()) -> set[Any]:
    """Return the nodes of the graph that tensors depend on, by ways that avoid those of `without`."""
    found: set[Any] = set()
    open_nodes = [t.grad_fn for t in tensors if t.grad_fn is not None and t.grad_fn not in without]
    while open_nodes:
        node = open_nodes.pop()
        if node not in found:
            found.add(node)
            open_nodes += [n for n, _ in node.next_functions if n is not None and n not in without and n not in found]
    return found


def misses_loss(run: Watcher, pair: Pair, numbers: Sequence[Number]) -> bool:
    """Return whether the loss depends on q by the samples alone, and not by any of these numbers."""
    loss = _loss_of(run.returned)
    anchors = [t for t in pair.anchors if t.requires_grad]
    if loss is None or not anchors:
        return False
    of_loss = nodes_of(loss)
    if any(n.live is not None and (n.live is loss or n.live.grad_fn in of_loss) for n in numbers):
        return False
    of_q = nodes_of(*anchors)
    samples = [t for t in _samples_in(run) if t.grad_fn is not None and t.grad_fn not in of_q]
    return not nodes_of(loss, without=frozenset(t.grad_fn for t in samples)) & of_q


def _loss_of(returned: Any) -> Tensor | None:
    loss = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", returned)
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def _samples_in(run: Watcher) -> list[Tensor]:
    """Return the samples of the latents, which the reconstruction depends on."""
    found = [t for seen in run.seen for t in seen.samples]
    samplers = (seen for seen in run.seen if _SAMPLER.search(seen.code.co_name.lower()))
    return found + [seen.returned for seen in samplers if isinstance(seen.returned, Tensor)]


def gradient_differs(module: nn.Module, number: Number, pair: Pair) -> bool:
    """Return whether a number with the KL's value has another gradient, where p has none of its own."""
    live = number.live
    if live is None or not live.requires_grad or live._version != number.version or pair.of:
        return False
    if any(t.requires_grad for t in tensors_of(pair.p)):
        return False  # part of it may be left out on purpose, as where a KL is balanced
    wanted: list[Tensor] = [t for t in module.parameters() if t.requires_grad] or [t for t in pair.anchors if t.is_leaf]
    try:
        exact = kl_divergence(pair.q, pair.p).sum()
        scale = float(live.detach().sum() / exact.detach())
        ours = torch.autograd.grad(exact, wanted, retain_graph=True, allow_unused=True)
        its = torch.autograd.grad(live.sum(), wanted, retain_graph=True, allow_unused=True)
    except (RuntimeError, NotImplementedError):
        return False
    off = [
        (torch.zeros(()) if a is None else a.double().cpu())
        - (torch.zeros(()) if b is None else scale * b.double().cpu())
        for a, b in zip(its, ours, strict=True)
    ]
    size = sum(float((scale * b).double().square().sum()) for b in ours if b is not None)
    return sum(float(t.square().sum()) for t in off) > _GRADIENT_TOLERANCE**2 * size
