"""Quadrature: right, or refused."""

import math

import mpmath as mp
import pytest
import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import (
    Beta,
    Categorical,
    Cauchy,
    Distribution,
    Gamma,
    GeneralizedPareto,
    HalfNormal,
    Independent,
    Kumaraswamy,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
    Uniform,
    VonMises,
    constraints,
)

from tests.families import FAMILIES, Family, Line, reference
from torch_klloss import AutoKL, QuadratureKL, kl_divergence
from torch_klloss.estimate import NotCertifiedError
from torch_klloss.methods import MonteCarlo, Quadrature


def f64(*values: float) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def log_normal_density(m, s):
    norm = mp.log(s * mp.sqrt(2 * mp.pi))
    return lambda x: -(((x - m) / s) ** 2) / 2 - norm


def log_student_density(nu):
    norm = mp.loggamma((nu + 1) / 2) - mp.loggamma(nu / 2) - mp.log(nu * mp.pi) / 2
    return lambda x: norm - (nu + 1) / 2 * mp.log1p(x * x / nu)


def log_mixture_density(weights, locs, scales):
    parts = [log_normal_density(m, s) for m, s in zip(locs, scales, strict=True)]
    return lambda x: mp.log(sum(w * mp.exp(part(x)) for w, part in zip(weights, parts, strict=True)))


def log_gamma_density(a, b):
    norm = a * mp.log(b) - mp.loggamma(a)
    return lambda x: norm + (a - 1) * mp.log(x) - b * x


def log_beta_density(a, b):
    norm = mp.loggamma(a + b) - mp.loggamma(a) - mp.loggamma(b)
    return lambda x: norm + (a - 1) * mp.log(x) + (b - 1) * mp.log1p(-x)


def log_kumaraswamy_density(a, b):
    return lambda x: mp.log(a * b) + (a - 1) * mp.log(x) + (b - 1) * mp.log1p(-(x**a))


def log_von_mises_density(m, k):
    norm = mp.log(2 * mp.pi * mp.besseli(0, k))
    return lambda x: k * mp.cos(x - m) - norm


def log_laplace_density(m, b):
    return lambda x: -abs(x - m) / b - mp.log(2 * b)


def mixture(weights, locs, scales) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(weights), Normal(locs, scales))


MIX = ((0.3, 0.7), (-2.0, 3.0), (0.5, 1.0))
LINE = (-12, -4, 0, 4, 12)
# q, p: their constructors, parameters and log-densities for mpmath; the points that split the integral.
EXAMPLES = {
    "Normal-StudentT": (Normal, (0.3, 1.2), log_normal_density, StudentT, (4.0,), log_student_density, LINE),
    "Normal-mixture": (Normal, (0.3, 1.2), log_normal_density, mixture, MIX, log_mixture_density, LINE),
    "Gamma(20)-Gamma": (Gamma, (20.0, 2.0), log_gamma_density, Gamma, (3.0, 1.0), log_gamma_density, (0, 5, 15, 60)),
    "Beta-Kumaraswamy": (Beta, (2.0, 3.0), log_beta_density, Kumaraswamy, (2.0, 2.0), log_kumaraswamy_density, (0, 1)),
    "VonMises-VonMises": (
        VonMises,
        (1.0, 3.0),
        log_von_mises_density,
        VonMises,
        (-1.0, 2.0),
        log_von_mises_density,
        (-math.pi, 0, math.pi),
    ),
    "concentrated VonMises": (
        VonMises,
        (3.0, 200.0),
        log_von_mises_density,
        VonMises,
        (-1.0, 2.0),
        log_von_mises_density,
        (2.3, 2.9, 3.1, 3.7),
    ),
    "Laplace-Normal": (
        Laplace,
        (0.2, 1.1),
        log_laplace_density,
        Normal,
        (0.0, 1.5),
        log_normal_density,
        (-50, 0.2, 50),
    ),
    "mixture-Normal": (
        mixture,
        MIX,
        log_mixture_density,
        Normal,
        (0.0, 2.0),
        log_normal_density,
        (-9, -4, -2, 0, 3, 6, 12),
    ),
}


def leaves(parameters) -> list[Tensor]:
    return [f64(*p).requires_grad_() if isinstance(p, tuple) else f64(p).requires_grad_() for p in parameters]


def exact_kl(q_density, q_params, p_density, p_params, points) -> float:
    with mp.workdps(25):
        q, p = (d(*([mp.mpf(v) for v in x] if isinstance(x, tuple) else mp.mpf(x) for x in params))
                for d, params in ((q_density, q_params), (p_density, p_params)))  # fmt: skip
        return float(mp.quad(lambda x: mp.exp(q(x)) * (q(x) - p(x)) if mp.exp(q(x)) > 0 else mp.mpf(0), points))


def shifted(params, k, h):
    """Return the parameters with the k-th number moved by h."""
    flat, count = [], 0
    for p in params:
        numbers = list(p) if isinstance(p, tuple) else [p]
        for j in range(len(numbers)):
            numbers[j] += h if count == k else 0.0
            count += 1
        flat.append(tuple(numbers) if isinstance(p, tuple) else numbers[0])
    return tuple(flat)


@pytest.mark.parametrize("name", EXAMPLES)
def test_value_and_gradient_are_right_at_64_nodes(name):
    make_q, q_params, q_density, make_p, p_params, p_density, points = EXAMPLES[name]
    q_leaves, p_leaves = leaves(q_params), leaves(p_params)
    estimate = Quadrature().estimate(make_q(*q_leaves), make_p(*p_leaves))
    truth = exact_kl(q_density, q_params, p_density, p_params, points)
    assert abs(estimate.value.item() - truth) <= 1e-8 * truth
    assert abs(estimate.value.item() - truth) <= estimate.error_bound.item() + 1e-12 * (
        1 + truth
    )  # torch's Bessel function
    grads = torch.autograd.grad(estimate.value, q_leaves + p_leaves)
    actual = torch.cat([g.reshape(-1) for g in grads]).tolist()
    for k, slope in enumerate(actual[: sum(p.numel() for p in q_leaves)][:2]):
        if "mixture" in name and k < 2:  # the weights are normalised: a step in one of them is one in both
            continue
        rise = [exact_kl(q_density, shifted(q_params, k, h), p_density, p_params, points) for h in (1e-3, -1e-3)]
        steep = [exact_kl(q_density, shifted(q_params, k, h), p_density, p_params, points) for h in (2e-3, -2e-3)]
        expected = (8 * (rise[0] - rise[1]) - (steep[0] - steep[1])) / 12e-3  # up to h⁴ times the fifth derivative
        assert slope == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("q", "p", "num_nodes"),
    [
        (Gamma(f64(0.3), f64(1.0)), Gamma(f64(3.0), f64(1.0)), 256),
        (Gamma(f64(0.3), f64(1.0)), Gamma(f64(3.0), f64(1.0)), 64),
        (Gamma(f64(0.02), f64(1.0)), Gamma(f64(3.0), f64(1.0)), 64),
        (Beta(f64(2.0), f64(0.3)), Beta(f64(1.5), f64(2.0)), 64),
        (LogNormal(f64(0.0), f64(10.0)), LogNormal(f64(1.0), f64(8.0)), 64),
        (Cauchy(f64(0.0), f64(1.0)), Cauchy(f64(3.0), f64(0.01)), 64),
    ],
    ids=["Gamma(.3) 256", "Gamma(.3)", "Gamma(.02)", "Beta(2, .3)", "LogNormal(0, 10)", "Cauchy"],
)
def test_poles_and_heavy_tails_are_followed(q, p, num_nodes):
    estimate = Quadrature(num_nodes).estimate(q, p)
    truth = kl_divergence(q, p)
    assert (estimate.value - truth).abs() <= torch.maximum(1e-6 * truth, estimate.error_bound)
    assert (estimate.value - truth).abs() <= 1e-8 * truth


ON_A_LINE = [f for f in FAMILIES if isinstance(f.kl, Line)]


@pytest.mark.parametrize(
    ("draws", "partners"),
    [
        ((0,), slice(0, None, 2)),
        pytest.param((0,), slice(1, None, 2), marks=pytest.mark.exhaustive),
        pytest.param((1, 2, 3), slice(None), marks=pytest.mark.exhaustive),
    ],
    ids=["first, every other", "first, the others", "rest"],
)
@pytest.mark.parametrize("f", ON_A_LINE, ids=lambda f: f.name)
def test_no_certified_number_is_wrong(f: Family, draws: tuple[int, ...], partners: slice):
    generator = torch.Generator().manual_seed(len(f.name))
    raw_q = (2 * torch.rand(4, f.size, generator=generator, dtype=f.dtype) - 1).requires_grad_()
    for g in ON_A_LINE[partners]:
        raw_p = (2 * torch.rand(4, g.size, generator=generator, dtype=g.dtype) - 1).requires_grad_()
        for i in draws:
            ref = reference(f, g, raw_q[i], raw_p[i])
            if not ref.value.isnan() and ref.error < 1e-7 * (1 + ref.magnitude):
                check_one(f(raw_q[i]), g(raw_p[i]), ref, torch.promote_types(f.dtype, g.dtype))


def check_one(q: Distribution, p: Distribution, ref, dtype) -> None:
    try:
        estimate = Quadrature().estimate(q, p)
    except NotCertifiedError:
        return
    bound = torch.maximum(1e-6 * ref.value.abs(), estimate.error_bound)
    rounding = 256 * torch.finfo(dtype).eps * (1 + ref.magnitude)
    close = (estimate.value - ref.value).abs() <= bound + ref.error + rounding
    assert close or (estimate.value == math.inf and ref.value == math.inf), (q, p, estimate, ref)


COVERED = [
    (Normal(f64(0.3), f64(0.7)), StudentT(f64(2.0))),
    (StudentT(f64(4.0)), Normal(f64(0.3), f64(0.7))),
    (StudentT(f64(2.2)), Normal(f64(0.0), f64(1.0))),
    (Cauchy(f64(0.5), f64(2.0)), StudentT(f64(0.5), f64(0.1))),
    (dist.Pareto(f64(0.8), f64(2.5)), LogNormal(f64(0.2), f64(0.9))),
    (dist.Weibull(f64(1.3), f64(0.6)), HalfNormal(f64(1.4))),
    (dist.FisherSnedecor(f64(3.0), f64(1.0)), dist.HalfCauchy(f64(1.2))),
    (GeneralizedPareto(f64(0.0), f64(1.2), f64(0.3)), LogNormal(f64(2.5), f64(1.4))),
    (dist.InverseGamma(f64(2.5), f64(1.4)), Gamma(f64(3.0), f64(1.2))),
    (dist.ContinuousBernoulli(f64(0.3)), Kumaraswamy(f64(2.2), f64(1.7))),
    (dist.RelaxedBernoulli(f64(1.3), logits=f64(0.4)), Beta(f64(0.4), f64(0.6))),
    (Uniform(f64(1.0), f64(3.0)), VonMises(f64(0.5), f64(2.0))),
    (VonMises(f64(2.5), f64(50.0)), Normal(f64(0.0), f64(1.0))),
    (dist.Gumbel(f64(0.4), f64(0.8)), mixture(f64(0.3, 0.7), f64(-2.0, 3.0), f64(0.5, 1.0))),
]


@pytest.mark.parametrize(("q", "p"), COVERED, ids=[f"{type(q).__name__}-{type(p).__name__}" for q, p in COVERED])
def test_64_nodes_certify_unlike_pairs(q, p):
    estimate = Quadrature().estimate(q, p)
    finer = Quadrature(512, rtol=1e-8).estimate(q, p)
    assert (estimate.value - finer.value).abs() <= estimate.error_bound + finer.error_bound
    assert estimate.error_bound <= 1e-6 * estimate.value
    assert (estimate.exact, estimate.std_error, estimate.method) == (False, None, "quadrature")
    assert estimate.num_evaluations < 1000


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6, 1e-8])
def test_near_equality_the_relative_error_stays_small(distance):
    loc, scale = f64(distance), f64(1 + distance)

    truth = kl_divergence(Normal(f64(0.0), f64(1.0)), Normal(loc, scale))
    estimate = Quadrature().estimate(Normal(f64(0.0), f64(1.0)), Normal(loc, scale))
    assert abs(estimate.value / truth - 1) < 1e-6
    subtracted = (1 + estimate.value) - 1  # the digits that are left by the plain sum, which is near 1
    if distance == 1e-8:
        assert abs(subtracted / truth - 1) > 1e-6


def test_the_gradient_follows_the_ends_of_the_support():
    theta = f64(2.0).requires_grad_()
    value = Quadrature().estimate(Uniform(f64(0.0), theta), Normal(f64(0.0), f64(1.0))).value
    (slope,) = torch.autograd.grad(value, theta)
    assert slope == pytest.approx(-1 / 2 + 2 / 3, rel=1e-9)  # of -log θ + θ²/6 + constant
    held = Quadrature().estimate(Uniform(f64(0.0), f64(1.0)), Normal(f64(0.0), f64(1.0))).value
    assert held.grad_fn is None
    theta = f64(1.0).requires_grad_()
    value = Quadrature().estimate(Uniform(f64(0.0), theta), Normal(f64(0.0), f64(1.0))).value
    assert torch.autograd.grad(value, theta)[0] == pytest.approx(-1 + 1 / 3, rel=1e-9)


def test_components_with_gaps_and_moving_ends_are_integrated_one_by_one():
    highs = f64(1.0, 3.5).requires_grad_()
    q = MixtureSameFamily(Categorical(f64(0.5, 0.5)), Uniform(f64(0.0, 2.0), highs))
    value = Quadrature().estimate(q, Normal(f64(0.0), f64(1.0))).value
    second = 0.5 * (1 / 3) + 0.5 * (3.5**3 - 8) / 4.5
    truth = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1.5) + 0.5 * math.log(2 * math.pi) + second / 2
    assert value.item() == pytest.approx(truth, rel=1e-9)
    # d/db of ½ log(½/b) + ¼ b²/3, and of ½ log(½/(b-2)) + ¼ (b³-8)/(3 (b-2))
    slopes = [-0.5 + 1 / 6, -0.5 / 1.5 + (3 * 3.5**2 * 1.5 - (3.5**3 - 8)) / (12 * 1.5**2)]
    torch.testing.assert_close(torch.autograd.grad(value, highs)[0], f64(*slopes), rtol=1e-8, atol=0)


def test_a_narrow_component_is_resolved():
    narrow = mixture(f64(0.5, 0.5), f64(0.0, 0.3), f64(1.0, 1e-4))
    wide = Normal(f64(0.0), f64(1.0))
    for q, p, truth in ((wide, narrow, 0.6910927521370914), (narrow, wide, 3.6857220357933946)):
        assert Quadrature().estimate(q, p).value.item() == pytest.approx(truth, rel=1e-9)


def test_an_infinite_kl_is_found_and_has_no_gradient():
    df = f64(1.0, 2.0, 3.0).requires_grad_()
    value = Quadrature().estimate(StudentT(df), Normal(f64(0.0), f64(1.0))).value
    assert value.isinf().tolist() == [True, True, False]
    slope = torch.autograd.grad(value[2], df)[0]
    assert slope[:2].tolist() == [0.0, 0.0]
    assert slope[2] < 0
    value = Quadrature().estimate(Normal(0.0, torch.ones(2)), HalfNormal(1.0)).value
    assert value.tolist() == [math.inf, math.inf]


class Custom(Distribution):
    """A density that declares nothing but its support."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real

    def __init__(self, log_density, batch_shape=()):
        self.log_density = log_density
        super().__init__(torch.Size(batch_shape), validate_args=False)

    def log_prob(self, x):
        return self.log_density(x)


def power_tail(index: float) -> Custom:
    """Return a density ~ |x|^(-index - 1) without declared tails."""
    base = StudentT(f64(index))
    return Custom(base.log_prob)


def test_without_declared_tails_the_slope_decides_whether_the_kl_is_infinite():
    normal = Normal(f64(0.0), f64(1.0))
    assert Quadrature().estimate(power_tail(1.5), normal).value == math.inf
    truth = Quadrature().estimate(StudentT(f64(4.0)), normal).value
    assert Quadrature().estimate(power_tail(4.0), normal).value == pytest.approx(truth.item(), rel=1e-6)
    with pytest.raises(
        NotCertifiedError, match=r"cannot tell whether the KL is finite.*distance\^-0\.01.*declare_tails"
    ):
        Quadrature().estimate(power_tail(2.01), normal)


def test_the_tails_of_a_user_defined_density_without_a_batch_keep_float64():
    p = StudentT(f64(0.05))
    truth = Quadrature().estimate(StudentT(f64(0.1)), p).value.item()
    assert Quadrature().estimate(power_tail(0.1), p).value.item() == pytest.approx(truth, rel=1e-12)
    index = f64(1.5).requires_grad_()
    infinite = Quadrature().estimate(Custom(StudentT(index).log_prob), Normal(f64(0.0), f64(1.0))).value
    assert infinite == math.inf
    assert torch.autograd.grad(infinite, index)[0] == 0


def test_a_density_that_is_not_normalised_is_refused():
    twice = Custom(lambda x: Normal(f64(0.0), f64(1.0)).log_prob(x) + 0.01)
    with pytest.raises(NotCertifiedError, match=r"does not add up to 1 .* or MonteCarlo"):
        Quadrature().estimate(twice, StudentT(f64(4.0)))


def test_a_density_without_mean_and_spread_is_found():
    peak = Normal(f64(1e3), f64(1e-2))
    truth = Quadrature().estimate(peak, Cauchy(f64(0.0), f64(1.0))).value
    found = Quadrature().estimate(Custom(peak.log_prob), Cauchy(f64(0.0), f64(1.0)))
    assert found.value == pytest.approx(truth.item(), rel=1e-6)


def test_a_kink_that_is_not_declared_costs_more_but_is_not_missed():
    truth = Quadrature().estimate(Laplace(f64(0.3), f64(1.0)), Normal(f64(0.0), f64(1.0)))
    hidden = Quadrature().estimate(Custom(Laplace(f64(0.3), f64(1.0)).log_prob), Normal(f64(0.0), f64(1.0)))
    assert hidden.value == pytest.approx(truth.value.item(), rel=1e-6)
    assert hidden.num_evaluations > truth.num_evaluations
    declared = Custom(Laplace(f64(0.3), f64(1.0)).log_prob)
    declared.breakpoints = f64(0.3).reshape(1)
    assert Quadrature().estimate(declared, Normal(f64(0.0), f64(1.0))).num_evaluations < hidden.num_evaluations


def test_parameters_outside_the_distribution_get_their_gradient():
    net = torch.nn.Linear(1, 2, dtype=torch.float64)
    q = Custom(lambda x: Normal(net.weight[:, 0], f64(1.0)).log_prob(x), (2,))
    Quadrature().estimate(q, StudentT(f64(4.0))).value.sum().backward()
    loc = net.weight[:, 0].detach().clone().requires_grad_()
    Quadrature().estimate(Normal(loc, f64(1.0)), StudentT(f64(4.0))).value.sum().backward()
    torch.testing.assert_close(net.weight.grad[:, 0], loc.grad, rtol=1e-6, atol=1e-9)


def test_a_batch_with_an_uncertified_element_is_refused_as_a_whole():
    scales = f64(1.0, 2.0)
    good = Quadrature(rtol=1e-6).estimate(Beta(scales, scales), Normal(f64(0.0), f64(1.0)))
    assert good.value.shape == (2,)
    q = Beta(f64(2.0, 2.0), f64(2.0, 0.02))  # half of the second lies where 1 - x has no digits
    with pytest.raises(
        NotCertifiedError, match=r"relative error of .* above rtol=1e-06, for 1 of 2 batch elements: .*"
    ):
        Quadrature().estimate(q, Normal(f64(0.0), f64(1.0)))
    fallback = AutoKL(fallback=[Quadrature(), MonteCarlo(64)])
    assert fallback.route(q, StudentT(f64(4.0))) == "quadrature, else monte_carlo"
    assert fallback.estimate(q, StudentT(f64(4.0))).method == "monte_carlo"
    assert fallback.estimate(Normal(f64(0.0), f64(1.0)), StudentT(f64(4.0))).method == "quadrature"


def test_every_element_is_what_it_is_alone_whatever_the_chunk(monkeypatch):
    loc, df = torch.randn(3, 1, dtype=torch.float64), torch.rand(5, dtype=torch.float64) * 3 + 2.2
    loc.requires_grad_(), df.requires_grad_()
    pairs = Normal(loc, f64(1.0)), StudentT(df)
    whole = Quadrature().estimate(*pairs).value
    monkeypatch.setattr("torch_klloss.methods.quadrature.method._CHUNK", 4 * 64)
    parts = Quadrature().estimate(*pairs).value
    alone = torch.stack([Quadrature().estimate(Normal(m, f64(1.0)), StudentT(n)).value for m in loc for n in df])
    assert whole.shape == (3, 5)
    for value in (parts, alone.reshape(3, 5)):
        torch.testing.assert_close(value, whole, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(value.sum(), (loc, df), retain_graph=True) for value in (whole, parts)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shapes", [((), ()), ((2,), ()), ((2, 1), (2,))])
def test_the_derivative_can_be_differentiated(shapes):
    loc, scale = (
        torch.full(s, x, dtype=torch.float64).requires_grad_() for s, x in zip(shapes, (0.3, 1.3), strict=True)
    )

    def value(loc, scale):
        return Quadrature().estimate(Normal(loc, scale), StudentT(f64(4.0))).value

    q = Normal(loc, scale)
    for parameters in ((loc, scale), (q.loc, q.scale)):
        plain = torch.autograd.grad(value(*parameters).sum(), parameters)
        recorded = torch.autograd.grad(value(*parameters).sum(), parameters, create_graph=True)
        torch.testing.assert_close(recorded, plain, rtol=1e-12, atol=1e-14)
        assert all(each.requires_grad and each.all() for each in recorded)
    assert torch.autograd.gradcheck(value, (loc, scale))
    assert torch.autograd.gradgradcheck(value, (loc, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_computed_in_float64_and_returned_in_its_own(dtype):
    loc = torch.tensor([0.25, 1.5], dtype=dtype, requires_grad=True)
    estimate = QuadratureKL(reduction="none").estimate(Normal(loc, torch.ones(2, dtype=dtype)), StudentT(4.0))
    exact = Quadrature().estimate(Normal(loc.detach().double(), f64(1.0)), StudentT(f64(4.0)))
    assert estimate.value.dtype == torch.float32
    torch.testing.assert_close(estimate.value, exact.value.float(), rtol=1e-7, atol=0)
    assert ((estimate.value.double() - exact.value).abs() <= estimate.error_bound).all()
    estimate.value.sum().backward()
    assert loc.grad.dtype == dtype


def test_independent_is_peeled_and_summed():
    q, p = Normal(torch.zeros(2, 3), 1.0), StudentT(torch.tensor([3.0, 4.0, 5.0]))
    parts = Quadrature().estimate(q, p)
    joint = Quadrature().estimate(Independent(q, 1), Independent(p.expand((2, 3)), 1))
    torch.testing.assert_close(joint.value, parts.value.sum(-1))
    assert joint.value.shape == joint.error_bound.shape == (2,)


def test_nan_parameters_give_nan_and_an_empty_batch_nothing():
    q = Normal(torch.tensor([0.0, math.nan]), 1.0, validate_args=False)
    assert Quadrature().estimate(q, StudentT(4.0)).value.isnan().tolist() == [False, True]
    assert Quadrature().estimate(Normal(torch.zeros(0), 1.0), StudentT(4.0)).value.shape == (0,)


def test_a_pair_in_two_dimensions_is_refused():
    q, p = (MultivariateNormal(torch.full((2,), loc), torch.eye(2)) for loc in (0.0, 1.0))
    assert Quadrature().supports(q, p) is False
    with pytest.raises(NotImplementedError, match=r"simplify to one dimension.*use AutoKL"):
        Quadrature().estimate(q, p)


def test_counts_are_summed():
    q, p = Poisson(torch.tensor(3.0)), Poisson(torch.tensor(2.0))
    estimate = Quadrature().estimate(q, p)
    assert (estimate.method, Quadrature().route(q, p)) == ("enumeration", "enumeration")
    torch.testing.assert_close(estimate.value, kl_divergence(q, p))


def test_auto_samples_counts_unless_its_fallback_sums_them():
    q, p = Poisson(torch.tensor(3.0)), NegativeBinomial(3, torch.tensor(0.4))
    assert AutoKL().route(q, p) == "monte_carlo"
    careful = AutoKL(fallback=[Quadrature(), MonteCarlo(64)])
    assert careful.route(q, p) == "enumeration, else monte_carlo"
    assert careful.estimate(q, p).method == "enumeration"


def test_under_tracing_it_is_refused():
    def value(loc):
        return Quadrature().estimate(Normal(loc, 1.0), StudentT(4.0)).value

    with pytest.raises(NotImplementedError, match="must be able to refuse"):
        torch.func.vmap(value)(torch.zeros(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_nodes": 8}, "num_nodes must be an integer of at least 16, got 8"),
        ({"num_nodes": 64.0}, "num_nodes must be an integer of at least 16, got 64.0"),
        ({"rtol": 0.0}, "rtol must lie strictly between 0 and 1, got 0.0"),
    ],
)
def test_invalid_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Quadrature(**arguments)


def test_a_tolerance_below_the_rounding_of_the_result_is_refused():
    q, p = Normal(torch.zeros(2), 1.0), StudentT(4.0)
    with pytest.raises(
        NotCertifiedError, match=r"cannot certify a result in torch.float32, which is rounded by 6.0e-08"
    ):
        QuadratureKL(rtol=1e-9)(q, p)
    assert QuadratureKL(rtol=1e-7)(q, p) > 0
    assert QuadratureKL(rtol=1e-9)(Normal(torch.zeros(2).double(), 1.0), StudentT(4.0)) > 0


def test_neither_the_random_stream_nor_sample_nor_icdf_is_touched():
    class Silent(Normal):
        def sample(self, *args):
            raise AssertionError("sampled")

        rsample = icdf = sample

    state = torch.get_rng_state()
    Quadrature().estimate(Silent(0.0, 1.0), StudentT(4.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_a_million_times_better_than_sampling_at_equal_cost():
    q, p = Normal(f64(0.3), f64(1.2)), StudentT(f64(4.0))
    estimate = Quadrature().estimate(q, p)
    truth = exact_kl(log_normal_density, (0.3, 1.2), log_student_density, (4.0,), LINE)
    draws = MonteCarlo(10_000).estimate(q, p, torch.Generator().manual_seed(0))
    variance = draws.std_error**2 * 10_000 / estimate.num_evaluations  # of as many draws as there were evaluations
    assert variance > 1e6 * (estimate.value - truth) ** 2
