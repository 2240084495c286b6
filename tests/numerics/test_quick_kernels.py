"""Kernels that are quick where nothing cancels: what they give in float32, against the careful formulas in float64."""

import pytest
import torch
from torch.distributions import Beta, Categorical, Dirichlet, Gamma, Gumbel

from torch_klloss import kl_divergence
from torch_klloss.numerics import quick_kernels

BUILD = {
    "Gamma": lambda a, b, c, d: (Gamma(a, b), Gamma(c, d)),
    "Gumbel": lambda a, b, c, d: (Gumbel(a, b), Gumbel(c, d)),
    "Beta": lambda a, b, c, d: (Beta(a, b), Beta(c, d)),
    "Dirichlet": lambda a, b, c, d: (Dirichlet(a + b), Dirichlet(c + d)),
    "Categorical by probabilities": lambda a, b, c, d: (Categorical(a + b), Categorical(c + d)),
    "Categorical by logits": lambda a, b, c, d: (Categorical(logits=a + b), Categorical(logits=c + d)),
}


def parameters(p_shape):
    """Return parameters of q and p: one row is the same in both, one nearly so, and the others lie apart."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.rand(6, 4, generator=generator) + 0.5 for _ in range(4))
    if p_shape == "full":
        for of_q, of_p in ((a, c), (b, d)):
            of_p[0], of_p[1] = of_q[0], of_q[1] * (1 + 1e-6)
        return a, b, c, d
    a[0], b[0] = c[0], d[0]
    return a, b, c[0], d[0]


def value_and_derivatives(build, tensors, dtype):
    """Return the KL, its gradients, and derivatives of these."""
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
    value = kl_divergence(*build(*leaves))
    first = torch.autograd.grad(value.sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((1 + i) * g.sum() + g.square().sum() for i, g in enumerate(first)), leaves)
    return [t.detach() for t in (value, *first, *second)]


def largest_error(build, p_shape):
    tensors = parameters(p_shape)
    pairs = zip(
        *(value_and_derivatives(build, tensors, dtype) for dtype in (torch.float32, torch.float64)), strict=True
    )
    return max(float((narrow.double() - wide).abs().max() / wide.abs().max()) for narrow, wide in pairs)


@pytest.mark.parametrize("p_shape", ["full", "broadcast"])
@pytest.mark.parametrize("name", BUILD)
def test_elements_that_cancel_and_others_have_the_same_digits_up_to_the_second_derivative(name, p_shape):
    assert largest_error(BUILD[name], p_shape) <= 2e-6


def test_the_elements_that_cancel_are_computed_again(monkeypatch):
    near = torch.full((5,), 50.0), torch.full((5,), 50.0) * (1 + 2e-7)
    pair = Gamma(near[0], 1.0), Gamma(near[1], 1.0)
    exact = kl_divergence(*(Gamma(t.double(), torch.ones((), dtype=torch.float64)) for t in near))
    torch.testing.assert_close(kl_divergence(*pair).double(), exact, rtol=1e-6, atol=0)
    monkeypatch.setattr(quick_kernels, "LOST", -torch.inf)
    assert ((kl_divergence(*pair).double() - exact).abs() > 1e-3 * exact).any()
