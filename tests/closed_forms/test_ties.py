"""Derivatives where two branches of a formula meet: at round numbers, at equal parameters, where supports touch."""

import math
import random
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributions import (
    Beta,
    ContinuousBernoulli,
    Distribution,
    Exponential,
    Gumbel,
    LogNormal,
    NegativeBinomial,
    Normal,
    Pareto,
    Uniform,
    VonMises,
)

from tests.closed_forms.test_registered_pairs import INSTANCES, PAIRS, Pair, by_kind, representatives
from tests.conventions import Ties
from tests.families import FAMILIES, Space
from torch_klloss import AutoKL, kl_divergence
from torch_klloss.closed_forms.cross_family import registration
from torch_klloss.distributions.densities import _FORMULAS, log_density
from torch_klloss.methods import Enumeration

POSITIVE = (0.5, 1.0, 2.0, 3.0, 6.0, 8.0, 10.0)
REAL = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
PROBS = (0.0, 0.25, 0.5, 0.75, 1.0)
exactly = partial(torch.tensor, dtype=torch.float64)
NUM = 150  # combinations of a pair

OTHER_FORMS = {
    f"{f.name}‖{g.name}": Pair.of(f, g)
    for h in FAMILIES
    if INSTANCES[h.type] is not h
    for f, g in ((h, h), (h, INSTANCES[h.type]), (INSTANCES[h.type], h))
}
every_pair = pytest.mark.parametrize("pair", [*PAIRS.values(), *OTHER_FORMS.values()], ids=[*PAIRS, *OTHER_FORMS])
every_pair_in_turn = pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, id=name, marks=[] if name in representatives(by_kind) else [pytest.mark.exhaustive])
        for name, pair in {**PAIRS, **OTHER_FORMS}.items()
    ],
)
"""In every run a pair of every kind."""


def round_values(space: Space) -> list[Tensor]:
    """Return values `[*parameter]` of the space at round numbers."""
    ends = [space.of(end * torch.ones(space.size, dtype=torch.float64)) for end in (-1.0, 1.0)]
    size = ends[0].shape
    if space.size == 0:
        return ends[:1]
    if len(size) == 2:
        identity = torch.eye(*size, dtype=torch.float64)
        return [identity, 2 * identity, identity + torch.ones(size, dtype=torch.float64).tril(-1)]
    lowest, highest = min(end.min().item() for end in ends), max(end.max().item() for end in ends)
    values = PROBS if lowest > 0 and highest < 1 else POSITIVE if lowest > 0 else REAL
    if not size:
        return [torch.tensor(value, dtype=torch.float64) for value in values]
    last = values[: size[0]] if values is not PROBS else [0.5, 0.5, 0.0, 0.0]
    equal = [torch.full(size, value, dtype=torch.float64) for value in values[1:4]]
    return [*equal, torch.tensor(last, dtype=torch.float64)]


def combinations(pair: Pair) -> list[Tensor]:
    """Return the parameters `[NUM, *parameter]`: all combinations of round values, or some of them."""
    of_each = [round_values(space) for side in (pair.q, pair.p) for space in side.spaces.values()]
    if math.prod(map(len, of_each)) <= NUM:
        found = list(product(*of_each))
    else:
        draws = random.Random(0)
        found = [tuple(draws.choice(values) for values in of_each) for _ in range(NUM)]
    return [torch.stack(values) for values in zip(*found, strict=True)]


def backward(pair: Pair, parameters: list[Tensor]) -> list[Tensor]:
    """Return the derivatives of the KL."""
    return list(_gradient(pair, parameters, create_graph=False)[1])


def backward_twice(pair: Pair, parameters: list[Tensor]) -> list[Tensor]:
    """Return the derivatives of a sum of the derivatives of the KL."""
    wanted, first = _gradient(pair, parameters, create_graph=True)
    total = sum((i + 1.0) * g.sum() for i, g in enumerate(first))
    second = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else ()
    return [g for g in second if g is not None]


def _gradient(pair: Pair, parameters: list[Tensor], create_graph: bool) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    leaves = [t.clone().requires_grad_(i in pair.free) for i, t in enumerate(parameters)]
    wanted = [leaves[i] for i in pair.free]
    return wanted, torch.autograd.grad(pair.kl(*leaves).sum(), wanted, create_graph=create_graph)


def forward(pair: Pair, parameters: list[Tensor]) -> list[Tensor]:
    """Return the derivative of the KL along one direction."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.full_like(t, i + 1.0)) for i, t in enumerate(parameters)]
        tangent = forward_ad.unpack_dual(
            pair.kl(*(duals[i] if i in pair.free else t for i, t in enumerate(parameters)))
        ).tangent
    return [] if tangent is None else [tangent]


def under_both(derivatives, *arguments):
    """Return what the derivatives are under the two conventions that differ most."""
    found = []
    for share in (0.0, 1.0):
        with Ties(share):
            found.append(derivatives(*arguments))
    return found


@pytest.fixture
def uncertified(monkeypatch):
    """Take every sum of moments, however much of it rounding may have cost."""
    monkeypatch.setattr(registration, "TOLERANCE", dict.fromkeys(registration.TOLERANCE, math.inf))
    monkeypatch.setattr(registration, "_certified", lambda kl, *_: kl.value)


def parameters_of(pair: Pair) -> list[Tensor]:
    return combinations(pair) if pair.traced else pair.parameters((3,), (3,))  # torch's constructor checks them


def assert_free_of_conventions(derivatives, *arguments):
    zero, one = under_both(derivatives, *arguments)
    torch.testing.assert_close(zero, one, rtol=1e-9, atol=1e-9, equal_nan=True)


@every_pair
def test_no_derivative_depends_on_the_convention_at_a_tie(pair, uncertified):
    assert_free_of_conventions(backward, pair, parameters_of(pair))


@every_pair_in_turn
def test_no_forward_derivative_depends_on_it(pair, uncertified):
    assert_free_of_conventions(forward, pair, parameters_of(pair))


@pytest.mark.exhaustive
@every_pair
def test_no_second_derivative_depends_on_it_either(pair, uncertified):
    assert_free_of_conventions(backward_twice, pair, parameters_of(pair))


COUNTS = ["Bernoulli", "Bernoulli(logits)", "Binomial", "Geometric", "NegativeBinomial", "Poisson"]


def enumerated(q: Distribution, p: Distribution) -> Tensor:
    return Enumeration().estimate(q, p).value


@pytest.mark.parametrize(("q_name", "p_name"), list(product(COUNTS, COUNTS)))
def test_no_derivative_of_a_sum_depends_on_it(q_name, p_name):
    families = {f.name: f for f in FAMILIES}
    pair = replace(Pair.of(families[q_name], families[p_name]), rule=enumerated)
    parameters = combinations(pair)
    if q_name in ("Geometric", "NegativeBinomial"):  # else the sum may have no end
        inside = (parameters[len(pair.q.spaces) - 1] - 0.5).abs() < 0.5
        parameters = [t[inside] for t in parameters]
    assert_free_of_conventions(backward, pair, parameters)


def test_no_derivative_by_a_number_of_failures_depends_on_it():
    failures = torch.arange(0.5, 16.5, 0.5, dtype=torch.float64).requires_grad_()

    def derivatives():
        value = enumerated(
            NegativeBinomial(failures, exactly(0.4)), NegativeBinomial(torch.full_like(failures, 2.5), 0.5)
        )
        return torch.autograd.grad(value.sum(), failures)

    assert_free_of_conventions(derivatives)


@pytest.mark.parametrize("f", [f for f in FAMILIES if f.type in _FORMULAS], ids=lambda f: f.name)
def test_no_derivative_of_a_log_density_depends_on_it(f):
    x = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64).unsqueeze(-1)

    def derivatives(order):
        leaves = [
            torch.stack(c).requires_grad_() for c in zip(*product(*map(round_values, f.spaces.values())), strict=True)
        ]
        d = f.of(dict(zip(f.spaces, leaves, strict=True)), validate_args=False)
        wanted = [leaf for leaf, space in zip(leaves, f.spaces.values(), strict=True) if not space.constant]
        points = x
        if d.event_shape:  # on the simplex, which suits a Dirichlet and an Independent alike
            points = x.unsqueeze(-1) + torch.arange(d.event_shape.numel())
            points = (points / points.sum(-1, keepdim=True)).view(3, 1, *d.event_shape)
        found = torch.autograd.grad(log_density(d, points, True).sum(), wanted, create_graph=order == 2)
        return torch.autograd.grad(sum(g.sum() for g in found), wanted) if order == 2 else found

    for order in (1, 2):
        assert_free_of_conventions(derivatives, order)


# At a tie: the pair of given parameters, the parameters, and the derivatives by them; by central differences of
# integrals and sums in 40 digits (mpmath), by the ends of a support of what lies inside of it.
KNOWN = [
    (
        lambda a, b, m, s: (Uniform(a, b), Gumbel(m, s)),
        (0, 1, 0, 1),
        (1.1321205588285577, -0.7642411176571153, -0.3678794411714423, 0.7642411176571153),
    ),
    (
        lambda a, b, m, s: (Uniform(a, b), LogNormal(m, s)),
        (0.5, 1, -1, 0.5),
        (4.474142055373732, 0.5355176945529151, -2.772588722239781, -2.1563758886543886),
    ),
    (
        lambda w, a, b: (Uniform(0.0, w), Beta(a, b)),
        (0.5, 0.5, 2),
        (-0.22741127776021876, -0.9735194861067213, 0.02648051389327864),
    ),
    (
        lambda w, a: (Uniform(1.0, 1 + w), Pareto(1.0, a)),
        (1, 2),
        (-0.07944154167983593, -0.11370563888010938),
    ),
    (
        lambda t, r: (ContinuousBernoulli(logits=t), Exponential(r)),
        (-1, 2),
        (0.07932640579220768, -0.08197670686932643),
    ),
    (lambda t: (ContinuousBernoulli(logits=t), Normal(0.0, 0.5)), (1,), (0.24858042168509802,)),
    (lambda t: (ContinuousBernoulli(logits=t), Normal(0.0, 0.5)), (-1,), (0.06872520148373271,)),
    (lambda t: (ContinuousBernoulli(logits=t), Uniform(-1.0, 2.0)), (-1,), (-0.07932640579220768,)),
    (lambda t: (Beta(2.0, 3.0), ContinuousBernoulli(logits=t)), (-2,), (-0.05651764274966565,)),
    (lambda t: (Uniform(0.25, 0.75), ContinuousBernoulli(logits=t)), (1,), (0.08197670686932643,)),
    (lambda b: (VonMises(exactly(0.0), 1.0), Uniform(exactly(-math.pi), b)), (math.pi,), (0.5 / math.pi,)),
    (
        lambda r, p: (NegativeBinomial(r, p), NegativeBinomial(2.5, 0.5)),
        (3, 0.4),
        (-0.07381528396694774, -0.9752500910889275),
    ),
    (lambda r: (NegativeBinomial(r, exactly(0.4)), NegativeBinomial(2.5, 0.5)), (10,), (0.270330697303445,)),
]


@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize(("pair", "values", "expected"), KNOWN)
def test_the_derivative_at_a_tie_is_that_of_the_definition(share, pair, values, expected):
    leaves = [torch.tensor(float(value), dtype=torch.float64, requires_grad=True) for value in values]
    with nullcontext() if share is None else Ties(share):
        found = torch.autograd.grad(AutoKL(fallback=Enumeration())(*pair(*leaves)), leaves)
    torch.testing.assert_close(torch.stack(found), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_uniform_that_begins_at_zero_falls_against_a_log_normal_as_its_end_rises():
    low = torch.tensor([0.0, 1e-100, 1e-20], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(kl_divergence(Uniform(low, 1.0), LogNormal(0.0, 1.0)).sum(), low)
    # (E[½ (log x)² + log x] - ½ (log low)² - log low) - 1 + ..., infinite at 0, where it is kept finite
    assert slope.isfinite().all()
    assert (slope.diff() > 0).all()
    assert slope[0] < -1e3


@pytest.mark.parametrize(
    "clamp", [Tensor.clamp_min, torch.clamp, lambda x, low: torch.maximum(x, torch.full_like(x, low))]
)
def test_the_sweep_rejects_a_formula_that_meets_its_clamp(clamp):
    def derivatives():
        x = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(torch.where(x < 1, x, clamp(x, 1.0).square() / 2).sum(), x)

    with pytest.raises(AssertionError):
        assert_free_of_conventions(derivatives)
