"""Pairs of families whose KL is infinite whatever the parameters."""

from __future__ import annotations

from itertools import product

import torch.distributions as dist
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.closed_forms.cross_family.registration import FAMILIES
from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.distributions.tensors import dtype_of
from torch_klloss.numerics.elementary import infinity

Types = tuple[type[Distribution], ...]

_LINE: Types = (dist.Normal, dist.Laplace, dist.Gumbel, dist.StudentT, dist.Cauchy)
_LIGHT: Types = (dist.Exponential, dist.Gamma)  # -log p grows as x
_HALF_LINE: Types = (
    *_LIGHT,
    dist.FisherSnedecor,
    dist.HalfCauchy,
    dist.HalfNormal,
    dist.InverseGamma,
    dist.LogNormal,
    dist.Weibull,
)
_UNIT: Types = (dist.Beta, dist.ContinuousBernoulli, dist.Kumaraswamy)
_MOVING: Types = (dist.Uniform, dist.Pareto)
_CIRCLE: Types = (dist.VonMises,)
# A density that is neither 0 nor infinite at 0, against one whose -log grows as 1/x.
_FLAT_AT_ZERO: Types = (dist.Exponential, dist.HalfNormal, dist.HalfCauchy, dist.ContinuousBernoulli)

INFINITE: list[tuple[Types, Types]] = [  # of q, and of p
    (_LINE, (*_HALF_LINE, *_UNIT, *_MOVING, *_CIRCLE, dist.GeneralizedPareto)),
    (_HALF_LINE, (*_UNIT, *_MOVING, *_CIRCLE)),
    ((dist.Pareto,), (*_UNIT, dist.Uniform, *_CIRCLE)),
    (_UNIT, (dist.Pareto,)),
    (_CIRCLE, (*_HALF_LINE, *_UNIT, dist.Pareto)),
    ((dist.Cauchy, dist.HalfCauchy), (dist.Normal, dist.Laplace, dist.Gumbel)),
    ((dist.HalfCauchy,), (dist.HalfNormal, *_LIGHT)),
    ((dist.StudentT,), (dist.Gumbel,)),
    (_FLAT_AT_ZERO, (dist.InverseGamma,)),
]


def _infinite(q: Distribution, p: Distribution) -> Tensor:
    """Infinite: q has mass where p has none, or tails that are too heavy for p."""
    value = infinity(*_parameters(q), *_parameters(p))
    return value.to(dtype_of(q, p))


def _parameters(d: Distribution) -> tuple[Tensor, ...]:
    families = [FAMILIES[cls] for cls in type(d).__mro__ if cls in FAMILIES]
    return families[0].parameters_of(d)


for _types_q, _types_p in INFINITE:
    for _type_q, _type_p in product(_types_q, _types_p):
        register_kl(_type_q, _type_p)(_infinite)
