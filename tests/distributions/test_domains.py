"""Parameters outside of their domain, as a distribution built without validation may have them."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributions as dist
from torch import Tensor

from tests.closed_forms.test_registered_pairs import PAIRS, Pair
from tests.closed_forms.test_ties import every_pair
from tests.families import FAMILIES
from tests.processes import run
from torch_klloss import AnalyticKL, AutoKL, MonteCarloKL, has_closed_form, kl_divergence
from torch_klloss.distributions.domains import domains_of, where_outside
from torch_klloss.estimate import NotCertifiedError
from torch_klloss.methods import Enumeration, MixtureBound, MonteCarlo, Quadrature

pytestmark = pytest.mark.usefixtures("unvalidated")

FREE = {"loc", "logits", "logvar", "low", "cov_factor", "like"}  # any number will do
REFUSED = (ValueError, torch.linalg.LinAlgError)  # by torch's constructors


def constrained(pair: Pair) -> list[tuple[int, str]]:
    """Return the positions and names of the parameters that are not free."""
    sides = [(side.family, name) for side in (pair.q, pair.p) for name in side.spaces]
    is_free = [name in FREE or (f.type is dist.GeneralizedPareto and name == "concentration") for f, name in sides]
    return [(i, name) for i, (_, name) in enumerate(sides) if not is_free[i]]


def spoiled(parameters: list[Tensor], i: int, value: float) -> list[Tensor]:
    """Return the parameters with one entry of the second batch element replaced."""
    parameters = [t.clone() for t in parameters]
    parameters[i][1].view(-1)[0] = value
    return parameters


def assert_only_the_second_is_nan(pair: Pair, refusals: tuple[type[Exception], ...], dtype=torch.float64) -> None:
    parameters = pair.parameters((3,), (3,), dtype)
    value = pair.kl(*parameters)
    for i, name in constrained(pair):
        for bad in (-0.25, 3.0) if name == "probs" and parameters[i].dim() == 1 else (-0.25,):
            try:
                found = pair.kl(*spoiled(parameters, i, bad))
            except refusals:
                continue
            assert found.isnan().tolist() == [False, True, False], (name, i, bad)
            if pair.rule is kl_divergence:
                torch.testing.assert_close(found[::2], value[::2], rtol=1e-12, atol=1e-14)


def has_form(f) -> bool:
    pair = Pair.of(f, f)
    t = pair.parameters((), ())
    return has_closed_form(pair.q.build(t[: len(pair.q.spaces)]), pair.p.build(t[len(pair.q.spaces) :]))


@every_pair
def test_a_closed_form_is_nan_where_a_parameter_is_outside_of_its_domain(pair):
    assert_only_the_second_is_nan(pair, (*REFUSED, NotImplementedError))  # some need parameters that are alike


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("f", [f for f in FAMILIES if has_form(f)], ids=lambda f: f.name)
def test_it_is_on_an_accelerator_where_no_parameter_is_looked_at(f):
    assert_only_the_second_is_nan(Pair.of(f, f), (*REFUSED, NotImplementedError), torch.float32)


@pytest.mark.parametrize(
    "method", [MonteCarlo(4), MonteCarlo(4, gradient="score_function"), Quadrature(), Enumeration()]
)
@pytest.mark.parametrize("f", [f for f in FAMILIES if "rsample" not in f.defects], ids=lambda f: f.name)
def test_no_method_gives_a_number_for_such_a_parameter(f, method):
    pair = replace(Pair.of(f, f), rule=lambda q, p: method.estimate(q, p).value)
    try:
        pair.kl(*pair.parameters((3,), (3,), f.dtype))
    except (NotImplementedError, NotCertifiedError):
        pytest.skip("the method does not take the pair")
    # torch's samplers refuse some of them
    assert_only_the_second_is_nan(pair, (*REFUSED, NotImplementedError, NotCertifiedError, RuntimeError), f.dtype)


OUTSIDE = {
    "scale": lambda x: dist.Normal(0.0, x),
    "both scales": lambda x: dist.Laplace(0.0, x),
    "rate": dist.Exponential,
    "rate of a Poisson": dist.Poisson,
    "df": lambda x: dist.StudentT(x, 0.0, 1.0),
    "probability": dist.Bernoulli,
    "weights": lambda x: dist.Dirichlet(torch.stack((x, torch.ones_like(x)), -1)),
    "a part": lambda x: dist.Independent(dist.Normal(torch.zeros(2, 3), x.unsqueeze(-1).expand(2, 3)), 1),
    "a base": lambda x: dist.LogNormal(0.0, x),
    "a factor": lambda x: dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.diag_embed(torch.stack((x, x), -1))),
    "a component": lambda x: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2, 2), torch.stack((torch.ones_like(x), x), -1))
    ),
    "a temperature": lambda x: dist.RelaxedBernoulli(x, logits=torch.zeros(2)),
    "ends": lambda x: dist.Uniform(0.0, x),
    "an exponential of one": lambda x: dist.TransformedDistribution(dist.Normal(0.0, x), [dist.ExpTransform()]),
}


@pytest.mark.parametrize("build", OUTSIDE.values(), ids=OUTSIDE)
def test_the_loss_of_such_a_pair_is_nan(build):
    x = torch.tensor([-0.5, 0.75], requires_grad=True)
    good = build(torch.tensor([0.5, 0.25]))
    for q, p in ((build(x), good), (good, build(x)), (build(x), build(x))):
        value = AutoKL(fallback=MonteCarlo(8), reduction="none")(q, p)
        assert value.isnan().tolist() == [True, False]
        assert AutoKL(fallback=MonteCarlo(8))(q, p).isnan()


def test_a_negative_scale_is_no_reason_to_make_it_more_negative():
    std = torch.tensor([[-0.5, 1.0]], requires_grad=True)
    q = dist.Normal(torch.ones(1, 2), std)
    for loss in (AutoKL(), AnalyticKL(), MonteCarloKL(16)):
        assert loss(q, dist.Normal(0.0, 1.0)).isnan()


@pytest.mark.parametrize("side", ["upper", "lower"])
def test_the_bounds_of_a_mixture_are_nan(side):
    mixture = OUTSIDE["a component"]
    value = MixtureBound(side).estimate(mixture(torch.tensor([-0.5, 0.5])), mixture(torch.ones(2))).value
    assert value.isnan().tolist() == [True, False]


def test_what_was_validated_and_not_written_to_is_not_looked_at_again():
    d = dist.Normal(0.0, torch.ones(2), validate_args=True)
    with torch.no_grad():
        d.scale = -d.scale
    assert where_outside(d, d) is None


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, id=name, marks=[] if pair.q.family is pair.p.family else pytest.mark.exhaustive)
        for name, pair in PAIRS.items()
    ],
)
def test_a_validated_parameter_that_is_written_to_gives_no_plausible_number(pair):
    before = pair.parameters((3,), (3,))
    for i, name in constrained(pair):
        parameters = [t.clone() for t in before]
        of_q, of_p = parameters[: len(pair.q.spaces)], parameters[len(pair.q.spaces) :]
        try:
            q, p = (
                side.family.of(dict(zip(side.spaces, of, strict=True)), validate_args=True)
                for side, of in ((pair.q, of_q), (pair.p, of_p))
            )
            value = pair.rule(q, p).clone()
            parameters[i][1].view(-1)[0] = -0.25
            found = pair.rule(q, p)
        except (*REFUSED, NotImplementedError, TypeError):
            continue
        assert found[1].isnan() or torch.equal(found, value), name  # some families keep a copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, torch.tensor([True, True])])
def test_losses_see_a_validated_scale_that_is_written_to(dtype, mask):
    loc, scale = torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    q = dist.Normal(loc, scale, validate_args=True)
    p = dist.Normal(loc + 1, torch.ones_like(scale), validate_args=True)
    losses = [AutoKL(reduction="none"), MonteCarloKL(4, reduction="none")]
    assert all(loss(a, b, mask=mask).isfinite().all() for loss in losses for a, b in ((q, p), (p, q)))
    scale[1, 2] = -0.5
    for loss in losses:
        for a, b in ((q, p), (p, q)):
            assert loss(a, b, mask=mask).isnan().tolist() == [False, True]


def test_zero_and_nan_are_not_outside():
    d = dist.Normal(0.0, torch.tensor([0.0, math.nan, 1.0]))
    assert not where_outside(d, d).any()
    d = dist.Normal(0.0, torch.tensor([-1.0, math.nan, 1.0]))
    assert where_outside(d, d).tolist() == [True, False, False]


def test_a_class_of_a_user_is_held_to_its_own_domains():
    class Above(dist.Normal):
        arg_constraints = {"loc": dist.constraints.greater_than(2.0), "scale": dist.constraints.positive}  # noqa: RUF012

    assert {(each.name, each.low) for each in domains_of(Above)} >= {("loc", 2.0), ("scale", 0.0)}
    assert kl_divergence(Above(torch.tensor([1.0, 3.0]), 1.0), dist.Normal(0.0, 1.0)).isnan().tolist() == [True, False]


def kl_of_scales(q_scale, p_scale):
    return kl_divergence(dist.Normal(0.0, q_scale), dist.Laplace(0.0, p_scale))


def test_transforms_see_the_same():
    q_scale, p_scale = torch.tensor([-1.0, 1.0, 2.0]), torch.tensor([1.0, -1.0, 1.0])
    for found in (kl_of_scales(q_scale, p_scale), torch.func.vmap(kl_of_scales)(q_scale, p_scale)):
        assert found.isnan().tolist() == [True, True, False]
    gradient = torch.func.grad(lambda x: kl_of_scales(x, p_scale)[2])(q_scale)
    assert gradient.isfinite().all()
    assert gradient[2] != 0


COMPILED = """
import json, torch
torch.set_num_threads(1)
from tests.distributions.test_domains import kl_of_scales

value = torch.compile(kl_of_scales, fullgraph=True, backend="eager")(torch.tensor([-1.0, 2.0]), torch.ones(2))
print(json.dumps(value.isnan().tolist()))
"""


@pytest.mark.long
def test_a_compiled_kl_is_nan_as_well():
    assert run(COMPILED) == [True, False]
