"""Certificates of random pairs of unlike families, whose classes are known or hidden."""

import math

import pytest
import torch

from tests.methods.quadrature.random_pairs import FAMILIES, PAIRS, Hidden, dense_kl, draw_parameters, is_infinite
from torch_klloss import kl_divergence
from torch_klloss.distributions.simplify import simplify
from torch_klloss.methods.quadrature.certificate import Certificate
from torch_klloss.methods.quadrature.integrand import integrand
from torch_klloss.methods.quadrature.solver import solve
from torch_klloss.methods.quadrature.state import OVERFLOWN, UNDECIDED

RTOL = 1e-6
CLASSES = [(False, False), (True, False), (False, True), (True, True)]


def certificates(q, p, count):
    """Return values and bounds of all elements, NaN where `Quadrature` refuses."""
    value, bound = torch.full((2, count), math.nan, dtype=torch.float64)
    q, p, _ = simplify(q, p)
    with torch.no_grad():
        for each in solve(integrand(q, p, True, torch.Size([count])), torch.arange(count), 64, RTOL):
            refused = is_refused(each)
            value[each.state.index] = torch.where(refused, math.nan, each.value)
            bound[each.state.index] = torch.where(refused, math.nan, each.error)
    return value, bound


def is_refused(certificate: Certificate):
    status = certificate.state.status
    overflown = (status == OVERFLOWN) & ~certificate.is_settled
    return ~certificate.is_within(RTOL) | (status == UNDECIDED) | overflown


def broken(pair, hidden, count, seed):
    """Return what a pair's certificates claim and does not hold, and how many were given."""
    (q, p), generator = (FAMILIES[name] for name in pair), torch.Generator().manual_seed(seed)
    of_q, of_p = (draw_parameters(family, count, generator) for family in (q, p))
    laws = (Hidden(f, of) if hide else f.build(*of) for f, of, hide in zip((q, p), (of_q, of_p), hidden, strict=True))
    value, bound = certificates(*laws, count)
    infinite, close = is_infinite(q, of_q, p, of_p)
    truth, again = (dense_kl(q, of_q, p, of_p, step) for step in (0.05, 0.043))
    doubt = 10 * (truth - again).abs() + 1e-12 * (1 + truth.abs())
    known, is_inf = ~value.isnan() & ~close, value == math.inf
    is_broken = known & ((is_inf & ~infinite) | (~is_inf & ~infinite & ((value - truth).abs() > bound + doubt)))
    if not any(hidden):  # a slower divergence than float64 shows is known from the declared tails alone
        is_broken = is_broken | (known & infinite & ~is_inf)
    found = [
        f"KL({pair[0]}‖{pair[1]}) {[t[i].item() for t in (*of_q, *of_p)]}: {value[i]} ± {bound[i]} for {truth[i]}"
        for i in is_broken.nonzero()[:, 0].tolist()
    ]
    return found, int(known.sum())


@pytest.mark.parametrize(
    "name", ["Normal", "Laplace", "Gamma", "HalfNormal", "Beta", "LogNormal", "Gumbel", "InverseGamma"]
)
def test_the_reference_is_that_of_the_closed_forms(name):
    family, generator = FAMILIES[name], torch.Generator().manual_seed(0)
    of_q, of_p = (draw_parameters(family, 20, generator) for _ in range(2))
    exact = kl_divergence(family.build(*of_q), family.build(*of_p))
    infinite, _ = is_infinite(family, of_q, family, of_p)
    torch.testing.assert_close(
        dense_kl(family, of_q, family, of_p, 0.05)[~infinite], exact[~infinite], rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("hidden", CLASSES)
def test_no_random_pair_breaks_its_certificate(hidden):
    certified = 0
    for k, pair in enumerate(PAIRS[CLASSES.index(hidden) :: 24]):
        found, known = broken(pair, hidden, 12, seed=k)
        assert found == []
        certified += known
    assert certified > 70


@pytest.mark.exhaustive
@pytest.mark.parametrize("pair", PAIRS, ids="‖".join)
def test_no_pair_of_many_breaks_its_certificate(pair):
    for k, hidden in enumerate(CLASSES):
        assert broken(pair, hidden, 120, seed=1000 + 7 * PAIRS.index(pair) + k)[0] == []
