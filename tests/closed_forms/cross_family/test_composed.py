"""Pairs of unlike families beside those of `test_written`: digits, bounds of the rounding, and infinite elements."""

import itertools

import mpmath as mp
import numpy as np
import pytest
import torch
import torch.distributions as dist

from tests.references import cross
from tests.references.composed import FAMILIES as REFERENCES
from tests.references.composed import pair
from tests.references.harness import draw, errors_at
from torch_klloss import MonteCarloKL, NotCertifiedError, has_closed_form, kl_divergence
from torch_klloss.closed_forms.cross_family import FAMILIES, FORMULAS
from torch_klloss.closed_forms.cross_family.infinite import INFINITE
from torch_klloss.closed_forms.cross_family.registration import TOLERANCE, by_moments
from torch_klloss.closed_forms.registry import _RULES
from torch_klloss.distributions.tails import is_infinite
from torch_klloss.methods import ClosedForm, FirstOf, MonteCarlo
from torch_klloss.numerics import rounded_special as special
from torch_klloss.numerics.rounded import Rounded

F64 = torch.float64
WRITTEN = {(reference.type_q, reference.type_p) for reference in cross.REFERENCES}
PAIRS = {f"{q.__name__}‖{p.__name__}": (q, p) for q, p in FORMULAS if (q, p) not in WRITTEN}
every_pair = pytest.mark.parametrize("name", PAIRS)
# Those that the design names, beside the pairs of one family.
NAMED = {
    *("Weibull‖Gamma", "Weibull‖Exponential", "Gamma‖Weibull", "InverseGamma‖Gamma", "Gamma‖InverseGamma"),
    *("LogNormal‖Gamma", "Gamma‖LogNormal", "LogNormal‖InverseGamma", "InverseGamma‖LogNormal"),
    *("LogNormal‖Weibull", "Weibull‖LogNormal", "LogNormal‖Normal", "HalfNormal‖Exponential"),
    *("Exponential‖HalfNormal", "HalfNormal‖Gamma", "Gamma‖HalfNormal", "HalfNormal‖LogNormal"),
    *("Kumaraswamy‖Beta", "Kumaraswamy‖Uniform", "Laplace‖Gumbel", "StudentT‖Normal"),
    *(f"{q}‖Laplace" for q in ("Uniform", "Exponential", "HalfNormal", "LogNormal", "Pareto", "Gumbel")),
}
# Families that have members in common, and such a member of both; the mirrored pair meets there too.
SHARED = {
    "Weibull‖Exponential": ({"scale": 1.5, "concentration": 1.0}, {"rate": 1 / 1.5}),
    "Weibull‖Gamma": ({"scale": 1.5, "concentration": 1.0}, {"concentration": 1.0, "rate": 1 / 1.5}),
    "Exponential‖Weibull": ({"rate": 0.5}, {"scale": 2.0, "concentration": 1.0}),
    "Gamma‖Weibull": ({"concentration": 1.0, "rate": 0.5}, {"scale": 2.0, "concentration": 1.0}),
    "Kumaraswamy‖Uniform": ({"concentration1": 1.0, "concentration0": 1.0}, {"low": 0.0, "high": 1.0}),
    "GeneralizedPareto‖Exponential": ({"loc": 0.0, "scale": 2.0, "concentration": 0.0}, {"rate": 0.5}),
    "GeneralizedPareto‖Uniform": ({"loc": 1.0, "scale": 2.0, "concentration": -1.0}, {"low": 1.0, "high": 3.0}),
    "Cauchy‖StudentT": ({"loc": 0.5, "scale": 2.0}, {"df": 1.0, "loc": 0.5, "scale": 2.0}),
}


def number(x):
    return torch.tensor(x, dtype=F64)


def tensors(parameters):
    return {key: number(x) for key, x in parameters.items()}


def certified(reference, q, p):
    """Return the draws, without those that are refused."""

    def takes(i):
        try:
            kl_divergence(*reference.build(*({key: t[i] for key, t in side.items()} for side in (q, p))))
        except NotCertifiedError:
            return False
        return True

    kept = [i for i in range(len(next(iter(q.values())))) if takes(i)]
    return [{key: t.detach()[kept].requires_grad_() for key, t in side.items()} for side in (q, p)], len(kept)


@pytest.fixture(scope="module", autouse=True)
def _few_digits():
    with mp.workdps(40):
        yield


def test_the_table_has_the_pairs_that_were_promised():
    assert set(PAIRS) >= NAMED
    assert _RULES.keys() >= FORMULAS.keys()


@pytest.mark.parametrize("regime", ["moderate", "wide"])
@every_pair
def test_values_and_gradients_have_the_digits_that_were_promised(name, regime, unvalidated):
    reference = pair(*PAIRS[name])
    for dtype, n in ((F64, 2), (torch.float32, 6)):
        (q, p), kept = certified(reference, *draw(reference, regime, dtype, n))
        assert kept == n or regime == "wide"
        if kept:
            errors = errors_at(reference, q, p, with_gradient=dtype == F64)
            assert max(errors.relative if dtype == F64 else errors.ulp) <= (1e-10 if dtype == F64 else 16)
            assert max(errors.gradient) <= 1e-9


@every_pair
def test_the_bound_of_the_rounding_is_one(name, unvalidated):
    """Near and far, refused or not: what was lost is less than the formula says."""
    types = PAIRS[name]
    reference = pair(*types)
    if not FAMILIES[types[0]].provides("entropy", *(FAMILIES[types[1]].needs or ())):
        pytest.skip("it has a formula of its own, and cannot be composed")
    formula = by_moments(*(FAMILIES[t] for t in types))
    for regime in ("moderate", "wide"):
        q, p = draw(reference, regime, F64, 4)
        kl = formula(*(t.detach() for t in (*q.values(), *p.values())))
        errors = errors_at(reference, q, p, kl=lambda *_, kl=kl: kl.value, with_gradient=False)
        for value, bound, truth in zip(errors.value, kl.error.expand(4).tolist(), errors.reference, strict=True):
            if mp.isfinite(truth):
                assert not abs(value - truth) > bound


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_member_has_no_kl_from_itself_and_little_from_its_neighbours(name, unvalidated):
    (type_q, type_p), (at_q, at_p) = PAIRS[name], SHARED[name]
    assert kl_divergence(type_q(**tensors(at_q)), type_p(**tensors(at_p))).abs() < 1e-30
    near = {key: x * (1 + 1e-3) if key in ("scale", "rate", "concentration1") else x for key, x in at_q.items()}
    p = {**at_p, "high": at_p["high"] + 0.01} if type_p is dist.Uniform else at_p
    truth = pair(type_q, type_p).kl(*({key: mp.mpf(x) for key, x in side.items()} for side in (near, p)))
    value = kl_divergence(type_q(**tensors(near)), type_p(**tensors(p))).item()
    assert abs(value - truth) <= 1e-10 * truth


def test_the_plain_sum_of_moments_loses_the_digits_that_the_shared_formula_keeps():
    near = tensors({"scale": 1.5, "concentration": 1.0 + 1e-6})
    p = tensors({"rate": 1 / 1.5})
    kl = by_moments(FAMILIES[dist.Weibull], FAMILIES[dist.Exponential])(*near.values(), *p.values())
    exact = kl_divergence(dist.Weibull(**near), dist.Exponential(**p))
    assert (kl.value - exact).abs() > 1e-6 * exact
    assert kl.error > TOLERANCE[F64] * exact  # and it says so


SPECIAL = {
    "log(1 + x)/x": (special.log1p_over, lambda x: mp.log1p(x) / x, (-0.9, -0.3, -5e-3, 1e-9, 4e-3, 0.02, 3.0, 1e6)),
    "log erfcx": (special.log_erfcx, lambda x: x**2 + mp.log(mp.erfc(x)), (1e-6, 0.3, 2.0, 20.0)),
    "log sin": (special.log_sine, lambda x: mp.log(mp.sin(x)), (1e-6, 0.3, 1.5, 3.0)),
    "log i0e": (special.log_i0e, lambda x: mp.log(mp.besseli(0, x)) - x, (1e-6, 0.3, 2.0, 20.0, 1e3)),
    "sin(x)/x": (special.sinc, lambda x: mp.sin(x) / x, (1e-9, 0.3, 2.0)),
    "entropy of a Gamma": (
        special.gamma_entropy,
        lambda a: a + mp.loggamma(a) + (1 - a) * mp.psi(0, a),
        (1e-2, 0.3, 1.0, 3.0, 100.0, 1e6),
    ),
    "exponential integral": (
        lambda x: Rounded(special.entire_exponential_integral(x.value), 1e-14 * x.size),
        lambda w: mp.e1(w) + mp.log(w) + mp.euler,
        (1e-6, 0.3, 3.0, 30.0, 39.9, 40.1, 1e3),
    ),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_a_function_and_its_derivative_are_those_of_their_definition(name):
    function, exact, points = SPECIAL[name]
    for point in points:
        x = number(point).requires_grad_()
        result = function(Rounded(x))
        (slope,) = torch.autograd.grad(result.value, x)
        truth, true_slope = exact(mp.mpf(point)), mp.diff(exact, mp.mpf(point), h=mp.mpf(10) ** -20 * point)
        assert abs(result.value.item() - truth) <= max(result.error.item(), 1e-15 * abs(truth))
        assert abs(slope.item() - true_slope) <= 1e-11 * abs(true_slope) + 1e-14


# What is refused


def near_pair():
    """Return a narrow LogNormal and the Gamma next to it, of which one element is far away."""
    q = dist.LogNormal(number([0.0, 0.0]), number([1e-5, 1.0]))
    return q, dist.Gamma(number(1e10), number(1e10))


def test_a_batch_with_an_uncertified_element_is_refused_as_a_whole_and_goes_on_to_the_next_method():
    q, p = near_pair()
    with pytest.raises(NotCertifiedError, match=r"may lose .* to rounding .* use AutoKL"):
        kl_divergence(q, p)
    assert not has_closed_form(q, p)
    assert FirstOf(ClosedForm(), MonteCarlo(4)).estimate(q, p).method == "monte_carlo"
    far = dist.LogNormal(q.loc[1:], q.scale[1:])
    assert has_closed_form(far, p)
    assert MonteCarloKL(64)(far, p).isfinite()


def test_nothing_is_refused_under_vmap_where_nobody_can_look():
    q, p = near_pair()

    def kl(loc, scale):
        return kl_divergence(dist.LogNormal(loc, scale, validate_args=False), p)

    assert torch.func.vmap(kl)(q.loc, q.scale).isfinite().all()


def test_float32_is_refused_later_than_float64():
    q, p = dist.LogNormal(number(0.0), number(1e-2)), dist.Gamma(number(1.0001e4), number(1e4))
    with pytest.raises(NotCertifiedError):
        kl_divergence(q, p)
    assert TOLERANCE[torch.float32] > TOLERANCE[F64]


def test_a_subclass_with_a_density_of_its_own_inherits_as_with_torch():
    class Other(dist.Weibull):
        def log_prob(self, value):
            return super().log_prob(value)

    p = dist.LogNormal(number(0.0), number(1.0))
    parameters = number(1.5), number(2.0)
    assert kl_divergence(Other(*parameters), p) == kl_divergence(dist.Weibull(*parameters), p)


# What is infinite


def test_an_element_whose_moment_diverges_is_infinite_and_has_no_gradient():
    df = number([1.0, 2.0, 3.0]).requires_grad_()
    scale = number(1.5).requires_grad_()
    value = kl_divergence(dist.StudentT(df), dist.Normal(number(0.0), scale))
    assert value.isinf().tolist() == [True, True, False]
    value[:2].sum().backward(retain_graph=True)
    assert df.grad.eq(0).all()
    assert scale.grad == 0
    value[2].backward()
    assert df.grad.eq(0).tolist() == [True, True, False]


def drawn(type_q, type_p, n, seed=0):
    drawn_q, drawn_p = pair(type_q, type_p).draw("moderate", n, np.random.default_rng(seed), F64)
    q, p = ({key: torch.tensor(np.asarray(x), dtype=F64) for key, x in side.items()} for side in (drawn_q, drawn_p))
    return type_q(**q, validate_args=False), type_p(**p, validate_args=False)


@pytest.mark.parametrize(("types_q", "types_p"), INFINITE)
def test_the_pairs_that_are_infinite_whatever_their_parameters_are_so_by_their_tails(types_q, types_p):
    for type_q, type_p in itertools.product(types_q, types_p):
        q, p = drawn(type_q, type_p, 40)
        assert is_infinite(q, p).all(), (type_q, type_p)
        assert kl_divergence(q, p).isinf().all()


def test_no_other_pair_of_families_is_infinite_at_every_draw_and_has_no_rule():
    for type_q, type_p in itertools.permutations(REFERENCES, 2):
        q, p = drawn(type_q, type_p, 2000)
        has_rule = (type_q, type_p) in _RULES
        assert has_rule or not is_infinite(q, p).all(), (type_q, type_p)
