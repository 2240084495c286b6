"""All families of `torch.distributions`, listed once; the laws of the library loop over them.

To add a family, add one entry to `FAMILIES`: how its parameters follow from numbers in [-1, 1], and how its KL is
told without a formula.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import Distribution

from tests.expectations import Density, Ends, Reference, integrate, is_infinite, log_density_on_line, sum_over


@dataclass(frozen=True)
class Space:
    """A parameter as a function of raw numbers in [-1, 1]: `[*batch, size]` -> `[*batch, *parameter]`."""

    size: int
    of: Callable[[Tensor], Tensor]


def scalar(of: Callable[[Tensor], Tensor]) -> Space:
    return Space(1, lambda raw: of(raw[..., 0]))


def cholesky(raw: Tensor) -> Tensor:
    """Return 3x3 factors from 6 numbers."""
    rows, columns = torch.tril_indices(3, 3)
    entries = torch.zeros(6, 3, 3, dtype=raw.dtype).index_put(
        (torch.arange(6), rows, columns), torch.ones((), dtype=raw.dtype)
    )
    return torch.einsum("...k,kij->...ij", torch.where(rows == columns, raw.exp(), raw), entries)


real = scalar(lambda raw: 2 * raw)
positive = scalar(torch.exp)
concentration = scalar(lambda raw: 2.3 * (0.8 * raw).exp())  # above 1: no mass where float64 has no points
unit = scalar(lambda raw: (3 * raw).sigmoid())
reals = Space(3, lambda raw: 2 * raw)
positives = Space(3, torch.exp)
concentrations = Space(3, lambda raw: 2.3 * (0.8 * raw).exp())
simplex = Space(3, lambda raw: (2 * raw).softmax(-1))
factor = Space(6, cholesky)
columns = Space(6, lambda raw: raw.unflatten(-1, (3, 2)))


@dataclass(frozen=True)
class Line:
    """A continuous family on the line: where its density begins, has a kink or a peak, and ends."""

    ends: Callable[[Distribution], Ends]
    density: Density = log_density_on_line

    def __call__(self, q: Distribution, p: Distribution) -> Reference:
        return self.against(self, q, p)

    def against(self, other: "Line", q: Distribution, p: Distribution) -> Reference:
        """Integrate over q's support, split where p has ends too."""
        first, *inner, last = self.ends(q)
        inner += [end for end in other.ends(p) if not is_infinite(end)]
        with torch.no_grad():  # only the outer ends move the KL
            lower, upper, *inner = (_as_batch(end, q.batch_shape) for end in (first, last, *inner))
            somewhere = torch.where(upper.isfinite(), (lower + upper) / 2, lower + 1)
            inner = [torch.where((lower < end) & (end < upper), end, somewhere) for end in inner]
            inner = torch.stack(inner).sort(0).values if inner else ()
        return integrate(q, p, [first, *inner, last], self.density, other.density)


def _as_batch(end: Tensor | float, batch_shape: torch.Size) -> Tensor:
    return torch.as_tensor(end, dtype=torch.float64).expand(batch_shape)


@dataclass(frozen=True)
class Counts:
    """A family on 0, 1, …, n - 1, or one whose mass beyond is below rounding."""

    n: int

    def __call__(self, q: Distribution, p: Distribution) -> Reference:
        return sum_over(q, p, torch.arange(self.n, dtype=torch.float64))

    def against(self, other: "Counts", q: Distribution, p: Distribution) -> Reference:
        return self(q, p)


line = Line(lambda d: (-math.inf, d.loc, math.inf))
half_line = Line(lambda d: (0.0, math.inf))
interval = Line(lambda d: (0.0, 1.0))


def _kumaraswamy_density(d: dist.Kumaraswamy, x: Tensor) -> Tensor:
    """Return what torch's log_prob, a chain of transforms, rounds to infinity near 0 and 1."""
    a, b = d.concentration1, d.concentration0
    return a.log() + b.log() + (a - 1) * x.log() + (b - 1) * torch.log(-torch.expm1(a * x.log()))


def _generalized_pareto_density(d: dist.GeneralizedPareto, x: Tensor) -> Tensor:
    """Return what torch's log_prob refuses in float64, comparing with a constant of the default dtype."""
    c = d.concentration
    inside = x.clamp_min(0.0)
    return torch.where(x < 0, -math.inf, -(1 + 1 / c) * torch.log1p(c * inside / d.scale) - d.scale.log())


def _von_mises_density(d: dist.VonMises, x: Tensor) -> Tensor:
    """Return what torch's log_prob knows to seven digits, by a polynomial for the Bessel function, on the circle."""
    c = d.concentration
    on_circle = c * (torch.cos(x - d.loc) - 1) - torch.special.i0e(c).log() - math.log(2 * math.pi)
    return torch.where(x.abs() <= math.pi, on_circle, -math.inf)


def one_hots(q: Distribution, p: Distribution) -> Reference:
    return sum_over(q, p, torch.eye(q.event_shape[0], dtype=torch.float64))


def count_vectors(q: Distribution, p: Distribution) -> Reference:
    counts = [c for c in itertools.product(range(q.total_count + 1), repeat=3) if sum(c) == q.total_count]
    return sum_over(q, p, torch.tensor(counts, dtype=torch.float64))


def two_classes(q: Distribution, p: Distribution) -> Reference:
    """Integrate over the first of two components that sum to one."""

    def density(d: Distribution, x: Tensor) -> Tensor:
        return d.log_prob(torch.stack((x, 1 - x), -1))

    return integrate(q, p, (0.0, 1.0), density, density)


def betas(pairs: list[tuple[Distribution, Distribution]]) -> Reference:
    return Reference.total([interval(q, p) for q, p in pairs])


def stick_breaking(q: dist.Dirichlet, p: dist.Dirichlet) -> Reference:
    """Break the stick: each piece is a Beta-distributed share of what is left, independent of the earlier ones."""

    def shares(d: dist.Dirichlet) -> list[Distribution]:
        c = d.concentration
        return [dist.Beta(c[..., k], c[..., k + 1 :].sum(-1), validate_args=False) for k in range(c.shape[-1] - 1)]

    return betas(list(zip(shares(q), shares(p), strict=True)))


def partial_correlations(q: dist.LKJCholesky, p: dist.LKJCholesky) -> Reference:
    """Take the partial correlations, which are independent: (1 + r)/2 ~ Beta(b, b), with b = η + (dim - level - 1)/2.

    References:
        *Generating random correlation matrices based on vines and extended onion method* (Lewandowski et al., 2009).
    """

    def beta(d: dist.LKJCholesky, level: int) -> Distribution:
        b = d.concentration + (d.dim - level - 1) / 2
        return dist.Beta(b, b, validate_args=False)

    levels = [level for level in range(1, q.dim) for _ in range(q.dim - level)]
    return betas([(beta(q, level), beta(p, level)) for level in levels])


def base_normals(q: Distribution, p: Distribution) -> Reference:
    """Integrate the Normals behind an injective transform, and sum over the components."""
    each = line(*(d.base_dist.base_dist for d in (q, p)))
    return Reference(*(part.sum(-1) for part in each))


def gaussians(q: Distribution, p: Distribution) -> Reference:
    """½ (tr(Σp⁻¹ Σq) + (μp - μq)ᵀ Σp⁻¹ (μp - μq) - d + log det Σp - log det Σq)."""
    precision, gap = torch.linalg.inv(p.covariance_matrix), p.loc - q.loc
    trace = (precision * q.covariance_matrix.mT).sum((-1, -2))
    distance = torch.einsum("...i,...ij,...j->...", gap, precision, gap)
    log_dets = torch.logdet(p.covariance_matrix), torch.logdet(q.covariance_matrix)
    return _formula((trace + distance - q.event_shape[0] + log_dets[0] - log_dets[1]) / 2, trace + distance)


def wisharts(q: dist.Wishart, p: dist.Wishart) -> Reference:
    """Take E[log det X] = ψ_d(ν/2) + d log 2 + log det V, E[X] = ν V, and the normalisers."""
    dim, v_q, v_p = q.event_shape[0], q.covariance_matrix, p.covariance_matrix
    halves = torch.arange(dim, dtype=torch.float64) / 2
    mean_log_det = torch.digamma(q.df.unsqueeze(-1) / 2 - halves).sum(-1) + dim * math.log(2) + torch.logdet(v_q)
    trace = (torch.linalg.inv(v_p) * v_q.mT).sum((-1, -2))

    def log_normaliser(d: dist.Wishart, v: Tensor) -> Tensor:
        return d.df / 2 * (dim * math.log(2) + torch.logdet(v)) + torch.special.multigammaln(d.df / 2, dim)

    value = (
        (q.df - p.df) / 2 * mean_log_det - q.df / 2 * (dim - trace) + log_normaliser(p, v_p) - log_normaliser(q, v_q)
    )
    return _formula(value, q.df * (dim + trace))


def _formula(value: Tensor, size: Tensor) -> Reference:
    return Reference(value, torch.zeros_like(value), size.detach().abs())


@dataclass(frozen=True)
class Family:
    """One family: how to build it, its parameters, and its KL, told without the formulas under test.

    Attributes:
        name: what the tests call it.
        build: takes the parameters, and `validate_args`, by keyword.
        kl: (q, p) -> Reference, for unvalidated q and p in float64.
        spaces: the parameters.
        dtype: float64 wherever torch can.
        defects: which of torch's own `sample` and `rsample` are wrong for it.
    """

    name: str
    build: Callable[..., Distribution]
    kl: Callable[[Any, Any], Reference]
    spaces: dict[str, Space] = field(hash=False)
    dtype: torch.dtype = torch.float64
    defects: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """How many raw numbers make one distribution."""
        return sum(space.size for space in self.spaces.values())

    def __call__(self, raw: Tensor, **options: Any) -> Distribution:
        """Return the distribution of raw numbers `[*batch, size]`; gradients flow back to them."""
        parts = raw.split([space.size for space in self.spaces.values()], -1)
        parameters = {name: space.of(part) for (name, space), part in zip(self.spaces.items(), parts, strict=True)}
        return self.build(**parameters, **options)

    def reference(self, q_raw: Tensor, p_raw: Tensor) -> Reference:
        """Return KL(q‖p) of the broadcast batch shape."""
        return reference(self, self, q_raw, p_raw)


def reference(f: Family, g: Family, q_raw: Tensor, p_raw: Tensor) -> Reference:
    """Return KL(q‖p) for q of family f and p of family g, both on the line or both on counts where f is not g."""
    shape = torch.broadcast_shapes(q_raw.shape[:-1], p_raw.shape[:-1])
    q = f(q_raw.double().expand(*shape, f.size), validate_args=False)
    p = g(p_raw.double().expand(*shape, g.size), validate_args=False)
    return f.kl(q, p) if f is g else f.kl.against(g.kl, q, p)


def _mixture(logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> Distribution:
    return dist.MixtureSameFamily(
        dist.Categorical(logits=logits, validate_args=validate_args),
        dist.Normal(loc, scale, validate_args=validate_args),
        validate_args=validate_args,
    )


def _generalized_pareto(scale: Tensor, concentration: Tensor, validate_args: bool | None = None) -> Distribution:
    return dist.GeneralizedPareto(torch.zeros_like(scale), scale, concentration, validate_args=validate_args)


def _uniform(low: Tensor, width: Tensor, validate_args: bool | None = None) -> Distribution:
    return dist.Uniform(low, low + width, validate_args=validate_args)


def _wishart(df: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> Distribution:
    return dist.Wishart(df + 4, scale_tril=scale_tril, validate_args=validate_args)


FAMILIES = [
    Family("Bernoulli", dist.Bernoulli, Counts(2), {"probs": unit}),
    Family("Bernoulli(logits)", dist.Bernoulli, Counts(2), {"logits": real}),
    Family("Beta", dist.Beta, interval, {"concentration1": concentration, "concentration0": concentration}),
    Family("Binomial", partial(dist.Binomial, 5), Counts(6), {"probs": unit}),
    Family("Binomial(logits)", partial(dist.Binomial, 5), Counts(6), {"logits": real}),
    Family("Categorical", dist.Categorical, Counts(3), {"probs": simplex}),
    Family("Categorical(logits)", dist.Categorical, Counts(3), {"logits": reals}),
    Family("Cauchy", dist.Cauchy, line, {"loc": real, "scale": positive}),
    Family("Chi2", dist.Chi2, half_line, {"df": scalar(lambda raw: 3 * raw.exp())}),
    Family("ContinuousBernoulli", dist.ContinuousBernoulli, interval, {"probs": unit}),
    Family("ContinuousBernoulli(logits)", dist.ContinuousBernoulli, interval, {"logits": real}),
    Family("Dirichlet", dist.Dirichlet, stick_breaking, {"concentration": concentrations}),
    Family("Exponential", dist.Exponential, half_line, {"rate": positive}),
    Family(
        "FisherSnedecor", dist.FisherSnedecor, half_line, {"df1": scalar(lambda raw: 3 * raw.exp()), "df2": positive}
    ),
    Family("Gamma", dist.Gamma, half_line, {"concentration": positive, "rate": positive}),
    Family(
        "GeneralizedPareto",
        _generalized_pareto,
        Line(half_line.ends, _generalized_pareto_density),
        {"scale": positive, "concentration": unit},
        dtype=torch.float32,  # its log_prob compares with a constant of the default dtype
    ),
    Family("Geometric", dist.Geometric, Counts(1000), {"probs": unit}),
    Family("Geometric(logits)", dist.Geometric, Counts(1000), {"logits": real}),
    Family("Gumbel", dist.Gumbel, line, {"loc": real, "scale": positive}),
    Family("HalfCauchy", dist.HalfCauchy, half_line, {"scale": positive}),
    Family("HalfNormal", dist.HalfNormal, half_line, {"scale": positive}),
    Family("InverseGamma", dist.InverseGamma, half_line, {"concentration": concentration, "rate": positive}),
    Family(
        "Kumaraswamy",
        dist.Kumaraswamy,
        Line(interval.ends, _kumaraswamy_density),
        {"concentration1": concentration, "concentration0": concentration},
    ),
    Family(
        "LKJCholesky",
        partial(dist.LKJCholesky, 3),
        partial_correlations,
        {"concentration": concentration},
        defects=frozenset({"sample"}),  # from three dimensions on it follows another law than the density
    ),
    Family("Laplace", dist.Laplace, line, {"loc": real, "scale": positive}),
    Family("LogNormal", dist.LogNormal, half_line, {"loc": real, "scale": positive}),
    Family("LogisticNormal", dist.LogisticNormal, base_normals, {"loc": reals, "scale": positives}),
    Family(
        "LowRankMultivariateNormal",
        dist.LowRankMultivariateNormal,
        gaussians,
        {"loc": reals, "cov_factor": columns, "cov_diag": positives},
    ),
    Family(
        "MixtureSameFamily",
        _mixture,
        Line(lambda d: (-math.inf, *d.component_distribution.loc.sort(-1).values.unbind(-1), math.inf)),
        {"logits": reals, "loc": reals, "scale": positives},
    ),
    Family("Multinomial", partial(dist.Multinomial, 3), count_vectors, {"probs": simplex}),
    Family("MultivariateNormal", dist.MultivariateNormal, gaussians, {"loc": reals, "scale_tril": factor}),
    Family("NegativeBinomial", partial(dist.NegativeBinomial, 4), Counts(1000), {"probs": unit}),
    Family("Normal", dist.Normal, line, {"loc": real, "scale": positive}),
    Family("OneHotCategorical", dist.OneHotCategorical, one_hots, {"probs": simplex}),
    Family(
        "OneHotCategoricalStraightThrough",
        dist.OneHotCategoricalStraightThrough,
        one_hots,
        {"logits": reals},
    ),
    Family("Pareto", dist.Pareto, Line(lambda d: (d.scale, math.inf)), {"scale": positive, "alpha": positive}),
    Family("Poisson", dist.Poisson, Counts(200), {"rate": positive}),
    Family("RelaxedBernoulli", dist.RelaxedBernoulli, interval, {"temperature": concentration, "logits": real}),
    Family(
        "RelaxedOneHotCategorical",
        partial(dist.RelaxedOneHotCategorical, torch.tensor(1.5, dtype=torch.float64)),
        two_classes,
        {"logits": Space(2, lambda raw: 2 * raw)},
    ),
    Family("StudentT", dist.StudentT, line, {"df": positive, "loc": real, "scale": positive}),
    Family(
        "Uniform",
        _uniform,
        Line(lambda d: (d.low, d.high)),
        {"low": scalar(lambda raw: 2 * raw - 0.1), "width": positive},
    ),
    Family(
        "VonMises",
        dist.VonMises,
        Line(lambda d: (-math.pi, math.pi), _von_mises_density),
        {"loc": real, "concentration": concentration},
    ),
    Family("Weibull", dist.Weibull, half_line, {"scale": positive, "concentration": positive}),
    Family(
        "Wishart",
        _wishart,
        wisharts,
        {"df": positive, "scale_tril": factor},
        defects=frozenset({"rsample"}),  # it writes in place to what its own derivative needs
    ),
]
