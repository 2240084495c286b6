"""Examples of every concrete class in `torch.distributions`, for the table of routes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import Distribution


@dataclass(frozen=True)
class Example:
    """An example of a class: two instances of one event shape, without a batch, in float64.

    Attributes:
        name: the class, and the classes inside it: "Independent(Normal)".
        q: the instance in the place of q.
        p: the instance in the place of p; its support holds q's.
    """

    name: str
    q: Distribution
    p: Distribution

    def is_of(self, type_name: str) -> bool:
        """Return whether the example is of the class called `type_name`, or has it inside."""
        return type_name in re.findall(r"\w+", self.name)


def same_shape(examples: Sequence[Example]) -> Iterator[tuple[Example, Example]]:
    """Yield every ordered pair of examples that share an event shape, those with themselves included."""
    for q in examples:
        for p in examples:
            if q.q.event_shape == p.p.event_shape:
                yield q, p


def all_examples() -> list[Example]:
    """Return the examples: every concrete class of `torch.distributions`, some with several contents or shapes."""
    made = (*_scalars(), *_counts(), *_planes(), *_vectors(), *_matrices())
    return [Example(_label(q), q, p) for q, p in made]


_Both = tuple[Distribution, Distribution]

# The class, the parameters of q, and those of p, whose support is the wider one where it depends on them.
SCALARS: tuple[tuple[type[Distribution], tuple[float, ...], tuple[float, ...]], ...] = (
    (dist.Normal, (0.3, 1.2), (-0.2, 1.5)),
    (dist.Laplace, (0.4, 0.8), (-0.1, 1.1)),
    (dist.Cauchy, (0.2, 0.7), (-0.3, 1.3)),
    (dist.StudentT, (3.0, 0.1, 0.9), (4.5, -0.2, 1.2)),
    (dist.Gumbel, (0.2, 0.9), (-0.1, 1.6)),
    (dist.VonMises, (0.5, 1.5), (-0.4, 2.5)),
    (dist.LogNormal, (0.1, 0.6), (0.3, 0.8)),
    (dist.Gamma, (2.5, 1.5), (1.8, 1.1)),
    (dist.Exponential, (1.3,), (0.8,)),
    (dist.Chi2, (3.0,), (4.2,)),
    (dist.HalfNormal, (1.1,), (1.6,)),
    (dist.HalfCauchy, (0.8,), (1.2,)),
    (dist.Weibull, (1.2, 1.7), (1.5, 1.4)),
    (dist.InverseGamma, (3.0, 1.5), (2.2, 1.9)),
    (dist.FisherSnedecor, (5.0, 7.0), (4.0, 6.0)),
    (dist.Pareto, (1.1, 2.5), (1.0, 1.8)),
    (dist.GeneralizedPareto, (0.0, 1.2, 0.3), (0.0, 0.9, 0.4)),
    (dist.Beta, (2.0, 3.0), (1.5, 2.2)),
    (dist.Kumaraswamy, (2.0, 2.5), (1.6, 1.9)),
    (dist.ContinuousBernoulli, (0.3,), (0.6,)),
    (dist.Uniform, (0.1, 0.9), (0.0, 1.0)),
    (dist.RelaxedBernoulli, (0.7, 0.4), (0.9, 0.6)),
    (dist.Bernoulli, (0.3,), (0.6,)),
    (dist.Geometric, (0.4,), (0.3,)),
    (dist.Poisson, (1.7,), (2.4,)),
)


def _scalars() -> Iterator[_Both]:
    for cls, *parameters in SCALARS:
        make: Any = cls
        q, p = (make(*map(_tensor, each)) for each in parameters)
        yield q, p
    one, affine = _tensor(1.0), dist.AffineTransform
    uniform, logit = dist.Uniform(0 * one, one), dist.SigmoidTransform().inv
    shifts = affine(0.2, 0.7), affine(-0.3, 1.1)
    yield _each(lambda i: dist.TransformedDistribution(uniform, [logit, shifts[i]]))
    yield (
        dist.TransformedDistribution(dist.Normal(0.1 * one, one), affine(0.3, 1.4)),
        dist.TransformedDistribution(dist.Normal(-0.2 * one, one), affine(0.1, -1.7)),
    )
    yield (
        dist.TransformedDistribution(dist.Gamma(2.5 * one, one), affine(1.5, 0.8)),
        dist.TransformedDistribution(dist.Gamma(1.8 * one, one), affine(1.2, 1.1)),
    )
    yield (
        dist.TransformedDistribution(dist.Laplace(0.2 * one, 0.3 * one), dist.ExpTransform()),
        dist.TransformedDistribution(dist.Laplace(-0.1 * one, 0.4 * one), dist.ExpTransform()),
    )
    yield (
        _mixture([0.4, 0.6], dist.Normal(_tensor([-1.0, 1.2]), _tensor([0.5, 0.8]))),
        _mixture([0.3, 0.7], dist.Normal(_tensor([-1.5, 1.0]), _tensor([0.9, 1.1]))),
    )
    yield (
        _mixture([0.4, 0.6], dist.Gamma(_tensor([2.5, 5.0]), _tensor([2.0, 1.5]))),
        _mixture([0.5, 0.5], dist.Gamma(_tensor([1.8, 4.0]), _tensor([1.4, 1.0]))),
    )


def _counts() -> Iterator[_Both]:
    yield dist.Binomial(5, _tensor(0.4)), dist.Binomial(6, _tensor(0.55))
    yield dist.Categorical(_tensor([0.2, 0.5, 0.3])), dist.Categorical(_tensor([0.4, 0.25, 0.35]))
    yield dist.NegativeBinomial(_tensor(3.0), _tensor(0.4)), dist.NegativeBinomial(_tensor(4.0), _tensor(0.45))
    yield (
        _mixture([0.4, 0.6], dist.Poisson(_tensor([0.8, 3.0]))),
        _mixture([0.5, 0.5], dist.Poisson(_tensor([1.2, 4.0]))),
    )


_LOC = [[0.3, -0.2], [-0.1, 0.4]]
_SCALE = [[1.2, 0.8], [1.5, 1.1]]
_TRIL = [[[1.1, 0.0], [0.4, 0.9]], [[1.3, 0.0], [-0.3, 1.2]]]


def _planes() -> Iterator[_Both]:
    loc, scale, tril = _tensor(_LOC), _tensor(_SCALE), _tensor(_TRIL)
    means = _tensor([[[-1.0, 0.5], [0.8, -0.6]], [[-1.2, 0.2], [1.0, 0.3]]])
    yield _each(lambda i: dist.MultivariateNormal(loc[i], scale_tril=tril[i]))
    yield _each(lambda i: dist.LowRankMultivariateNormal(loc[i], tril[i][:, :1], scale[i]))
    yield _each(lambda i: dist.Independent(dist.Normal(loc[i], scale[i]), 1))
    yield _each(lambda i: dist.Independent(dist.Laplace(loc[i], scale[i]), 1))
    yield _each(lambda i: dist.Independent(dist.StudentT(_tensor(8.0 + i), loc[i], scale[i]), 1))
    yield _each(lambda i: dist.Independent(dist.Gamma(2 * scale[i], scale[i]), 1))
    yield _each(lambda i: _mixture([0.4, 0.6], dist.MultivariateNormal(means[i], scale_tril=tril[i])))
    yield _each(lambda i: _mixture([0.3, 0.7], dist.Independent(dist.Normal(means[i], scale[i]), 1)))
    yield _each(
        lambda i: dist.TransformedDistribution(
            dist.Independent(dist.Normal(loc[i], scale[i]), 1), dist.AffineTransform(loc[i], scale[i], event_dim=1)
        )
    )


def _vectors() -> Iterator[_Both]:
    probs = _tensor([[0.2, 0.5, 0.3], [0.4, 0.25, 0.35]])
    yield _each(lambda i: dist.Dirichlet(8 * probs[i]))
    yield _each(lambda i: dist.LogisticNormal(_tensor(_LOC)[i], _tensor(_SCALE)[i]))
    yield _each(lambda i: dist.RelaxedOneHotCategorical(_tensor(1.5 - i), probs[i]))
    yield _each(lambda i: dist.OneHotCategorical(probs[i]))
    yield _each(lambda i: dist.OneHotCategoricalStraightThrough(probs[i]))
    yield _each(lambda i: dist.Multinomial(3, probs[i]))
    yield _each(lambda i: dist.Independent(dist.Bernoulli(probs[i]), 1))
    yield _each(lambda i: dist.Independent(dist.Poisson(3 * probs[i]), 1))
    yield _each(lambda i: dist.Independent(dist.LogNormal(probs[i], 2 * probs[i]), 1))
    yield _each(lambda i: dist.Independent(dist.Beta(6 * probs[i], 2 + probs[i]), 1))


def _matrices() -> Iterator[_Both]:
    loc, scale, tril = _tensor(_LOC), _tensor(_SCALE), _tensor(_TRIL)
    yield _each(lambda i: dist.Wishart(_tensor(4.0 + i), scale_tril=tril[i]))
    yield _each(lambda i: dist.LKJCholesky(2, _tensor(1.5 + i)))
    yield _each(lambda i: dist.Independent(dist.Normal(loc[i] * scale, scale[i]), 2))
    yield _each(lambda i: dist.Independent(dist.MultivariateNormal(loc, scale_tril=tril[i]), 1))
    yield _each(lambda i: dist.Independent(dist.Independent(dist.Uniform(loc - 1 - i, loc + scale + i), 1), 1))


def _each(make: Callable[[int], Distribution]) -> _Both:
    return make(0), make(1)


def _mixture(weights: list[float], components: Distribution) -> Distribution:
    return dist.MixtureSameFamily(dist.Categorical(_tensor(weights)), components)


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _label(d: Any) -> str:
    """Return the class of d with the classes inside it: MixtureSameFamily(Normal)."""
    name, cls = type(d).__name__, type(d)
    if cls is dist.MixtureSameFamily:
        return f"{name}({_label(d.component_distribution)})"
    if cls is dist.TransformedDistribution:
        last = type(d.transforms[-1]).__name__.removesuffix("Transform")
        return f"{name}({_label(d.base_dist)}, {last})"
    if cls is dist.Independent:
        dims = d.reinterpreted_batch_ndims
        return f"{name}({_label(d.base_dist)}{'' if dims == 1 else f', {dims}'})"
    return name
