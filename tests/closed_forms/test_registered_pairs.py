"""What every registered pair must do, whoever registered it: swept over torch's table and the library's own.

To cover a newly registered type, add one entry to `INSTANCES`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import Distribution, ExponentialFamily
from torch.distributions import kl_divergence as torch_kl
from torch.distributions.kl import _KL_REGISTRY
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli

from tests.processes import run
from torch_klloss import kl_divergence
from torch_klloss.closed_forms.registry import _RULES
from torch_klloss.distributions.families import LogVarNormal, RawCategorical, StandardNormal
from torch_klloss.distributions.logistic import Logistic

Batch = tuple[int, ...]
Parameters = dict[str, Tensor]
Space = Callable[[Batch, torch.dtype, float], Tensor]

ABSTRACT = {ExponentialFamily, Distribution}  # have no instances of their own; their rules stand for all classes
PARTS = 0.618033988749895


def between(low: float, high: float, *event: int) -> Space:
    """Fill [*batch, *event] with numbers between low and high, all different, that depend on a phase in [0, 1)."""

    def fill(batch: Batch, dtype: torch.dtype, phase: float) -> Tensor:
        shape = torch.Size((*batch, *event))
        steps = torch.arange(shape.numel(), dtype=torch.float64)
        return (low + (high - low) * ((phase + PARTS * steps) % 1)).view(shape).to(dtype)

    return fill


def factor(size: int) -> Space:
    def fill(batch: Batch, dtype: torch.dtype, phase: float) -> Tensor:
        entries = between(-0.5, 0.5, size, size)(batch, torch.float64, phase).tril(-1)
        diagonal = between(0.8, 1.6, size)(batch, torch.float64, phase)
        return (entries + torch.diag_embed(diagonal)).to(dtype)

    return fill


def simplex(size: int) -> Space:
    return lambda batch, dtype, phase: between(-1, 1, size)(batch, torch.float64, phase).softmax(-1).to(dtype)


REAL, POSITIVE, UNIT, COUNT = between(-1, 1), between(0.5, 2), between(0.2, 0.8), between(4, 4)
ALIKE = between(1.5, 1.5)  # of pairs that have a closed form only where q and p have the same


@dataclass(frozen=True)
class Instances:
    """How to build instances of a type.

    Args:
        type: the class, or a function that is called like it.
        spaces: what each parameter is filled with.
        as_p: the same where the type is p's, if that must differ for p to have the support of q.
        constants: parameters that are no function of anything, such as a number of trials.
        halves: whether torch can build it in half precision.
        nan: whether torch can build it from a NaN.
        traced: whether torch can build it under vmap and compile, asking for no value of a tensor.
    """

    type: Callable[..., Distribution]
    spaces: dict[str, Space] = field(default_factory=dict)
    as_p: dict[str, Space] | None = None
    constants: tuple[str, ...] = ()
    halves: bool = True
    nan: bool = True
    traced: bool = True

    def parameters(self, side: str, batch: Batch, dtype: torch.dtype = torch.float64) -> Parameters:
        spaces = self.as_p if side == "p" and self.as_p is not None else self.spaces
        phase = {"q": 0.1, "p": 0.37}[side]
        return {name: space(batch, dtype, (phase + 0.29 * i) % 1) for i, (name, space) in enumerate(spaces.items())}

    def build(self, parameters: Parameters) -> Distribution:
        return self.type(**parameters, validate_args=False)


def exp_of_normal(loc: Tensor, scale: Tensor, validate_args: bool) -> Distribution:
    base = dist.Normal(loc, scale, validate_args=validate_args)
    return dist.TransformedDistribution(base, [dist.ExpTransform()], validate_args=validate_args)


def independent_normals(loc: Tensor, scale: Tensor, validate_args: bool) -> Distribution:
    return dist.Independent(dist.Normal(loc, scale, validate_args=validate_args), 1, validate_args=validate_args)


def standard_normal(like: Tensor, validate_args: bool) -> Distribution:
    return StandardNormal(like.shape, dtype=like.dtype)


LOCATION_SCALE = {"loc": REAL, "scale": POSITIVE}
CONCENTRATIONS = {"concentration1": POSITIVE, "concentration0": POSITIVE}
FACTORS = {"loc": between(-1, 1, 3), "cov_factor": between(-1, 1, 3, 2), "cov_diag": between(0.5, 2, 3)}

INSTANCES: dict[type[Distribution], Instances] = {
    LogVarNormal: Instances(LogVarNormal, {"loc": REAL, "logvar": REAL}),
    RawCategorical: Instances(RawCategorical, {"logits": between(-1, 1, 4)}),
    StandardNormal: Instances(standard_normal, {"like": REAL}, constants=("like",)),
    dist.Bernoulli: Instances(dist.Bernoulli, {"probs": UNIT}),
    dist.Beta: Instances(dist.Beta, CONCENTRATIONS),
    dist.Binomial: Instances(dist.Binomial, {"total_count": COUNT, "probs": UNIT}, constants=("total_count",)),
    dist.Categorical: Instances(dist.Categorical, {"logits": between(-1, 1, 4)}),
    dist.Cauchy: Instances(dist.Cauchy, LOCATION_SCALE),
    dist.ContinuousBernoulli: Instances(dist.ContinuousBernoulli, {"logits": REAL}),
    dist.Dirichlet: Instances(dist.Dirichlet, {"concentration": between(0.5, 2, 3)}),
    dist.Exponential: Instances(dist.Exponential, {"rate": POSITIVE}),
    dist.FisherSnedecor: Instances(dist.FisherSnedecor, {"df1": between(3, 6), "df2": between(5, 9)}, nan=False),
    dist.Gamma: Instances(dist.Gamma, {"concentration": POSITIVE, "rate": POSITIVE}),
    dist.GeneralizedPareto: Instances(
        dist.GeneralizedPareto, {"loc": POSITIVE, "scale": POSITIVE, "concentration": between(-0.4, 0.4)}
    ),
    dist.Geometric: Instances(dist.Geometric, {"probs": UNIT}),
    dist.Gumbel: Instances(dist.Gumbel, LOCATION_SCALE),
    dist.HalfCauchy: Instances(dist.HalfCauchy, {"scale": POSITIVE}),
    dist.HalfNormal: Instances(dist.HalfNormal, {"scale": POSITIVE}),
    dist.Independent: Instances(independent_normals, {"loc": between(-1, 1, 3), "scale": between(0.5, 2, 3)}),
    dist.InverseGamma: Instances(dist.InverseGamma, {"concentration": POSITIVE, "rate": POSITIVE}),
    dist.Kumaraswamy: Instances(dist.Kumaraswamy, {"concentration1": ALIKE, "concentration0": POSITIVE}),
    dist.Laplace: Instances(dist.Laplace, LOCATION_SCALE),
    dist.LKJCholesky: Instances(partial(dist.LKJCholesky, 3), {"concentration": POSITIVE}, nan=False, traced=False),
    Logistic: Instances(Logistic, {"loc": REAL, "scale": ALIKE}),
    LogitRelaxedBernoulli: Instances(LogitRelaxedBernoulli, {"temperature": ALIKE, "logits": REAL}),
    dist.LogNormal: Instances(dist.LogNormal, LOCATION_SCALE),
    dist.LowRankMultivariateNormal: Instances(dist.LowRankMultivariateNormal, FACTORS, halves=False, nan=False),
    dist.Multinomial: Instances(partial(dist.Multinomial, 4), {"logits": between(-1, 1, 4)}, nan=False),
    dist.MultivariateNormal: Instances(dist.MultivariateNormal, {"loc": between(-1, 1, 3), "scale_tril": factor(3)}),
    dist.NegativeBinomial: Instances(
        dist.NegativeBinomial, {"total_count": COUNT, "probs": UNIT}, constants=("total_count",)
    ),
    dist.Normal: Instances(dist.Normal, LOCATION_SCALE),
    dist.OneHotCategorical: Instances(dist.OneHotCategorical, {"probs": simplex(4)}, nan=False),
    dist.Pareto: Instances(
        dist.Pareto,
        {"scale": POSITIVE, "alpha": between(2.5, 5)},
        as_p={"scale": between(0.05, 0.15), "alpha": POSITIVE},
    ),
    dist.Poisson: Instances(dist.Poisson, {"rate": POSITIVE}),
    dist.StudentT: Instances(dist.StudentT, {"df": between(3, 6), **LOCATION_SCALE}, nan=False),
    dist.TransformedDistribution: Instances(exp_of_normal, LOCATION_SCALE),
    dist.Uniform: Instances(
        dist.Uniform,
        {"low": between(0.2, 0.4), "high": between(0.6, 0.9)},
        as_p={"low": between(-2, -1), "high": between(2, 3)},
    ),
    dist.VonMises: Instances(dist.VonMises, {"loc": REAL, "concentration": POSITIVE}),
    dist.Weibull: Instances(dist.Weibull, {"scale": POSITIVE, "concentration": POSITIVE}),
    dist.Wishart: Instances(dist.Wishart, {"df": between(4, 8), "scale_tril": factor(3)}, nan=False, traced=False),
}

HOMES = ("torch.", "torch_klloss.")  # Pyro, where it was imported, has registered types of its own
TYPES = sorted(
    {
        types
        for types in (*_KL_REGISTRY, *_RULES)
        if ABSTRACT.isdisjoint(types) and all(cls.__module__.startswith(HOMES) for cls in types)
    },
    key=lambda types: tuple(cls.__name__ for cls in types),
)


@dataclass(frozen=True)
class Pair:
    """Two instances, and their KL as a function of one flat list of parameters, q's first."""

    q: Instances
    p: Instances
    rule: Callable[[Distribution, Distribution], Tensor] = kl_divergence

    def parameters(self, q_batch: Batch, p_batch: Batch, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        of_q, of_p = self.q.parameters("q", q_batch, dtype), self.p.parameters("p", p_batch, dtype)
        return [*of_q.values(), *of_p.values()]

    def kl(self, *parameters: Tensor) -> Tensor:
        of_q = dict(zip(self.q.spaces, parameters, strict=False))
        of_p = dict(zip(self.p.spaces, parameters[len(of_q) :], strict=True))
        return self.rule(self.q.build(of_q), self.p.build(of_p))

    @property
    def free(self) -> list[int]:
        """Which of the parameters can be differentiated by."""
        names = [(d, name) for d in (self.q, self.p) for name in d.spaces]
        return [i for i, (d, name) in enumerate(names) if name not in d.constants]

    @property
    def traced(self) -> bool:
        return self.q.traced and self.p.traced

    def leaves(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Return parameters, and those among them that can be differentiated by, as leaves."""
        parameters = self.parameters(batch, batch)
        return parameters, [parameters[i].requires_grad_() for i in self.free]


PAIRS = {f"{q.__name__}‖{p.__name__}": Pair(INSTANCES[q], INSTANCES[p]) for q, p in TYPES if {q, p} <= INSTANCES.keys()}
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def finite_sum(value: Tensor) -> Tensor:
    return torch.where(value.isfinite(), value, 0.0).sum()


def test_every_registered_type_has_instances():
    assert {cls for types in TYPES for cls in types} <= INSTANCES.keys(), "add an entry to INSTANCES"


@pytest.mark.parametrize(("q_batch", "p_batch"), [((3,), (2, 1)), ((2, 1), (3,)), ((2, 3), ()), ((), (2, 3))])
@every_pair
def test_batch_shapes_broadcast_to_the_kl_of_every_element(pair, q_batch, p_batch):
    of_q, of_p = pair.q.parameters("q", q_batch), pair.p.parameters("p", p_batch)
    value = pair.kl(*of_q.values(), *of_p.values())
    assert value.shape == torch.broadcast_shapes(q_batch, p_batch) == (2, 3)

    def element(t: Tensor, batch: Batch, index: Batch) -> Tensor:
        return t.expand(2, 3, *t.shape[len(batch) :])[index]

    for index in itertools.product(range(2), range(3)):
        alone = [element(t, batch, index) for d, batch in ((of_q, q_batch), (of_p, p_batch)) for t in d.values()]
        torch.testing.assert_close(value[index], pair.kl(*alone), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_pair
def test_the_dtype_that_comes_in_goes_out(pair, dtype):
    if dtype.itemsize == 2 and not (pair.q.halves and pair.p.halves):
        with pytest.raises((NotImplementedError, RuntimeError), match="not implemented for"):
            pair.kl(*pair.parameters((3,), (3,), dtype))
        return
    parameters = pair.parameters((3,), (3,), dtype)
    value, exact = pair.kl(*parameters), pair.kl(*(t.double() for t in parameters))
    assert value.dtype == dtype
    # The constructor may round as well, as that of Categorical does, to which the KL is no more sensitive than this.
    torch.testing.assert_close(
        value.double(), exact, rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps
    )


@every_pair
def test_vmap_gives_what_a_loop_gives(pair):
    if not pair.traced:
        pytest.skip("torch's constructor asks for the values of its arguments")
    parameters = pair.parameters((3,), (3,))
    loop = torch.stack([pair.kl(*(t[i] for t in parameters)) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(pair.kl)(*parameters), loop, rtol=1e-12, atol=1e-14)


@every_pair
def test_the_gradient_reaches_every_parameter_and_can_be_differentiated(pair):
    parameters, leaves = pair.leaves((3,))
    value = pair.kl(*parameters)
    gradient = torch.autograd.grad(value.sum(), leaves, create_graph=True, allow_unused=True)
    assert all(g is not None for g in gradient)
    if value.isinf().all():
        assert all((g == 0).all() for g in gradient)
        return
    assert all(g.isfinite().all() for g in gradient)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradient), leaves, allow_unused=True)
    assert any(g is not None for g in second)
    assert all(g is None or g.isfinite().all() for g in second)


@every_pair
def test_a_functional_gradient_is_that_of_backward(pair):
    parameters, leaves = pair.leaves((3,))
    expected = torch.autograd.grad(finite_sum(pair.kl(*parameters)), leaves, allow_unused=True)
    expected = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(expected, leaves, strict=True)]
    plain = [t.detach() for t in parameters]
    if pair.free and pair.traced:
        found = torch.func.grad(lambda *t: finite_sum(pair.kl(*t)), argnums=tuple(pair.free))(*plain)
        torch.testing.assert_close(list(found), expected, rtol=1e-10, atol=1e-12)


@every_pair
def test_a_nan_stays_where_it_is(pair):
    parameters = pair.parameters((3,), (3,))
    value = pair.kl(*parameters)
    for i in pair.free:
        d = pair.q if i < len(pair.q.spaces) else pair.p
        spoiled = [t.clone() for t in parameters]
        spoiled[i].view(3, -1)[1, 0] = torch.nan
        if not d.nan:
            continue
        found = pair.kl(*spoiled)
        assert found.isnan().tolist() == [False, True, False], i
        torch.testing.assert_close(found[::2], value[::2], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["Normal‖Uniform", "Beta‖Pareto", "Poisson‖Bernoulli", "Wishart‖Wishart"])
def test_the_sweep_rejects_the_shapes_of_torch(name):
    pair = replace(PAIRS[name], rule=torch_kl)
    with pytest.raises((AssertionError, RuntimeError)):
        test_batch_shapes_broadcast_to_the_kl_of_every_element(pair, (3,), (2, 1))


COMPILE_ALL = """
import json, torch
torch.set_num_threads(1)
from tests.closed_forms.test_registered_pairs import PAIRS


wrong = {}
for name, pair in PAIRS.items():
    if not pair.traced:
        continue
    parameters = pair.parameters((3,), (3,))
    torch.compiler.reset()
    try:
        value = torch.compile(pair.kl, fullgraph=True, backend="eager")(*parameters)
        torch.testing.assert_close(value, pair.kl(*parameters), rtol=1e-10, atol=1e-12)
    except Exception as error:
        wrong[name] = f"{type(error).__name__}: {error}"[:300]
print(json.dumps(wrong))
"""


def test_every_pair_compiles_to_one_graph_in_a_fresh_process():
    assert run(COMPILE_ALL) == {}
