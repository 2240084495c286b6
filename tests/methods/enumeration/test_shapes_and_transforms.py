"""Sums over counts in batch shapes that broadcast, and under the transforms of `torch.func`."""

import math

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Binomial,
    Categorical,
    Geometric,
    MixtureSameFamily,
    NegativeBinomial,
    Poisson,
    TransformedDistribution,
)

from torch_klloss.methods import Enumeration, NotCertifiedError, Quadrature


def mixture(component, shape):
    return MixtureSameFamily(Categorical(torch.ones(*shape, 2)), component)


FAMILIES = {
    "Poisson": lambda shape: Poisson(torch.full(shape, 1.5)),
    "Poisson(0)": lambda shape: Poisson(torch.zeros(shape)),
    "Geometric": lambda shape: Geometric(torch.full(shape, 0.4)),
    "Geometric(1)": lambda shape: Geometric(torch.ones(shape)),
    "NegativeBinomial": lambda shape: NegativeBinomial(torch.full(shape, 2.5), torch.full(shape, 0.5)),
    "NegativeBinomial(0)": lambda shape: NegativeBinomial(torch.full(shape, 2.5), torch.zeros(shape)),
    "mixture of Geometrics": lambda shape: mixture(Geometric(torch.tensor([0.3, 0.6]).expand(*shape, 2)), shape),
    "mixture of Poissons": lambda shape: mixture(Poisson(torch.tensor([0.0, 2.6]).expand(*shape, 2)), shape),
    "shifted Poisson": lambda s: TransformedDistribution(Poisson(torch.full(s, 1.5)), [AffineTransform(0.0, 1.0)]),
    "Binomial": lambda shape: Binomial(4, torch.full(shape, 0.3)),
    "Bernoulli": lambda shape: Bernoulli(torch.full(shape, 0.3)),
    "Categorical": lambda shape: Categorical(torch.ones(*shape, 4)),
}
SHAPES = [((), (3,)), ((3,), ()), ((1,), (2, 3)), ((2, 1), (3,)), ((2, 3), (2, 1))]


def pairs_in_turn(often=3):
    """Return all pairs of families; in every run a third of them, with every family as q and as p."""
    for i, of_q in enumerate(FAMILIES):
        for j, of_p in enumerate(FAMILIES):
            marks = pytest.mark.exhaustive if (i + j) % often else ()
            yield pytest.param(of_q, of_p, id=f"{of_q}-{of_p}", marks=marks)


@pytest.mark.parametrize(("of_q", "of_p"), list(pairs_in_turn()))
def test_the_batch_shapes_of_q_and_p_broadcast(of_q, of_p):
    def estimate(q_shape, p_shape):
        return Enumeration().estimate(FAMILIES[of_q](q_shape), FAMILIES[of_p](p_shape)).value

    try:
        alone = estimate((), ())
    except NotCertifiedError:
        for q_shape, p_shape in SHAPES:
            with pytest.raises(NotCertifiedError):
                estimate(q_shape, p_shape)
        return
    for q_shape, p_shape in SHAPES:
        expected = alone.expand(torch.broadcast_shapes(q_shape, p_shape))
        torch.testing.assert_close(estimate(q_shape, p_shape), expected, rtol=1e-6, atol=1e-12)


def test_a_poisson_of_rate_0_against_mixtures_of_geometrics_by_hand():
    probs = torch.tensor([[0.3, 0.6], [0.2, 0.9], [0.5, 0.5]], dtype=torch.float64)
    p = MixtureSameFamily(Categorical(torch.ones(3, 2, dtype=torch.float64)), Geometric(probs))
    got = Enumeration().estimate(Poisson(torch.zeros(2, 1, dtype=torch.float64)), p).value
    torch.testing.assert_close(got, -probs.mean(-1).log().expand(2, 3))


def geometric(logits):
    return Geometric(torch.sigmoid(logits), validate_args=False)  # torch's constructor looks at values


PAIRS = {
    "Poisson‖Poisson": lambda a: (Poisson(a), Poisson(2.5 + 0 * a)),
    "Poisson‖Geometric": lambda a: (Poisson(a), geometric(a - 1)),
    "Geometric‖Poisson": lambda a: (geometric(a), Poisson(a)),
    "NegativeBinomial‖Geometric": lambda a: (NegativeBinomial(a, torch.sigmoid(a - 1)), geometric(a - 2)),
    "mixture‖Geometric": lambda a: (
        MixtureSameFamily(Categorical(torch.stack([a, a + 1], -1)), Poisson(torch.stack([a, 2 * a], -1))),
        geometric(a - 2),
    ),
    "Poisson‖mixture": lambda a: (
        Poisson(a),
        MixtureSameFamily(Categorical(torch.stack([a, a + 1], -1)), geometric(torch.stack([a, 2 * a], -1) - 2)),
    ),
    "images": lambda a: (
        TransformedDistribution(Poisson(a), [AffineTransform(1.0, 2.0)]),
        TransformedDistribution(geometric(a - 1), [AffineTransform(1.0, 2.0)]),
    ),
    "Binomial‖Poisson": lambda a: (Binomial(4, torch.sigmoid(a)), Poisson(a)),
}


@pytest.mark.parametrize("method", [Enumeration(), Quadrature()], ids=["sum", "by quadrature"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_the_sum_is_taken_under_torch_func_as_outside(pair, method):
    if isinstance(method, Quadrature) and pair is not PAIRS["Poisson‖Geometric"]:
        return

    def kl(a):
        return method.estimate(*pair(a)).value

    a = torch.tensor([1.2, 0.7, 3.0], dtype=torch.float64)
    leaf = a.clone().requires_grad_()
    value = kl(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    second = torch.autograd.grad(gradient.sum(), leaf)[0]
    func = torch.func
    results = {
        "grad": (func.grad(lambda a: kl(a).sum())(a), gradient),
        "vmap": (func.vmap(kl)(a), value),
        "nested": (func.vmap(func.vmap(kl))(a[None]), value[None]),
        "vmap of grad": (func.vmap(func.grad(kl))(a), gradient),
        "hessian": (func.hessian(lambda a: kl(a).sum())(a), second.diag()),
        "jacfwd": (func.jacfwd(kl)(a), gradient.diag()),
        "jvp": (func.jvp(kl, (a,), (torch.ones_like(a),))[1], gradient),
    }
    for name, (got, expected) in results.items():
        torch.testing.assert_close(got, expected.detach(), rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_limits_and_certificates_hold_under_torch_func():
    rates = torch.tensor([1.0, 1e8], dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="sums at most max_terms=1000 counts"):
        torch.func.vmap(lambda r: Enumeration(max_terms=1000).estimate(Poisson(r), Poisson(2.0)).value)(rates)


@pytest.mark.parametrize(
    "q", [Poisson(3.0), Geometric(0.4), NegativeBinomial(2.5, 0.5)], ids=lambda d: type(d).__name__
)
@pytest.mark.parametrize("total", [10, 10**4, 10**12])
def test_counts_beyond_a_binomials_total_make_the_kl_infinite_however_many_fit(q, total):
    for method in (Enumeration(), Quadrature()):
        assert method.estimate(q, Binomial(torch.tensor(float(total)), 0.5)).value == math.inf


def test_a_poisson_of_rate_0_has_no_mass_beyond_it():
    expected = torch.tensor(-4 * math.log(0.5))
    torch.testing.assert_close(Enumeration().estimate(Poisson(0.0), Binomial(4, torch.tensor(0.5))).value, expected)
