"""All families of `torch.distributions` and of the library, each declared once.

To add a family, add one entry to `FAMILIES`: its parameters as functions of numbers in [-1, 1], and its KL from the
definition. `tests/test_laws.py`, the sweep of `tests/closed_forms/test_registered_pairs.py` and the accuracy targets of
`tests/references/targets.py` read it from here.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.nn.functional import logsigmoid

from tests.expectations import Density, Ends, Reference, integrate, is_infinite, log_density_on_line, sum_over
from torch_klloss.distributions.families import LogVarNormal, RawCategorical, StandardNormal
from torch_klloss.distributions.logistic import Logistic


@dataclass(frozen=True)
class Space:
    """A parameter as a function of raw numbers in [-1, 1]: `[*batch, size]` -> `[*batch, *parameter]`.

    Attributes:
        size: the number of raw numbers.
        of: the function.
        wide: the function where no quadrature has to follow the density; `of` by default.
        constant: whether the parameter cannot be differentiated by, such as a number of trials.
    """

    size: int
    of: Callable[[Tensor], Tensor]
    wide: Callable[[Tensor], Tensor] | None = None
    constant: bool = False


def scalar(of: Callable[[Tensor], Tensor]) -> Space:
    return Space(1, lambda raw: of(raw[..., 0]))


def between(low: float, high: float) -> Space:
    return scalar(lambda raw: (low + high) / 2 + (high - low) / 2 * raw)


def fixed(value: float, constant: bool = False) -> Space:
    """Return the space of one value, the same in q and p."""
    return Space(0, lambda raw: raw.new_full(raw.shape[:-1], value), constant=constant)


def cholesky(raw: Tensor) -> Tensor:
    """Return 3x3 factors from 6 numbers."""
    rows, columns = torch.tril_indices(3, 3)
    entries = torch.zeros(6, 3, 3, dtype=raw.dtype).index_put(
        (torch.arange(6), rows, columns), torch.ones((), dtype=raw.dtype)
    )
    return torch.einsum("...k,kij->...ij", torch.where(rows == columns, raw.exp(), raw), entries)


def peaked(raw: Tensor) -> Tensor:
    """Return concentrations above 1: no mass where float64 has no points."""
    return 2.3 * (0.8 * raw).exp()


real = scalar(lambda raw: 2 * raw)
positive = scalar(torch.exp)
concentration = Space(1, lambda raw: peaked(raw[..., 0]), lambda raw: raw[..., 0].exp())
unit = scalar(lambda raw: (3 * raw).sigmoid())
reals = Space(3, lambda raw: 2 * raw)
positives = Space(3, torch.exp)
concentrations = Space(3, peaked, torch.exp)
logits = Space(4, lambda raw: 2 * raw)
simplex = Space(4, lambda raw: (2 * raw).softmax(-1))
factor = Space(6, cholesky)
columns = Space(6, lambda raw: raw.unflatten(-1, (3, 2)))


@dataclass(frozen=True)
class Line:
    """A continuous family on the line: the points where its density begins, has a kink or a peak, and ends."""

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

    def mass_below(self, d: Distribution, x: Tensor) -> Tensor:
        """Return the probability of values below x `[*batch]`."""
        first, *inner, _ = self.ends(d)
        inner = [torch.minimum(_as_batch(end, x.shape), x) for end in inner]
        log_ratio_of_one = integrate(d, d, [first, *inner, x], self.density, lambda d, x: self.density(d, x) - 1)
        return log_ratio_of_one.value


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
    """Return the log-density; torch's, by a chain of transforms, rounds to infinity near 0 and 1."""
    a, b = d.concentration1, d.concentration0
    return a.log() + b.log() + (a - 1) * x.log() + (b - 1) * torch.log(-torch.expm1(a * x.log()))


def _generalized_pareto_density(d: dist.GeneralizedPareto, x: Tensor) -> Tensor:
    """Return the log-density; torch's compares with a constant of the default dtype, and refuses float64."""
    c = d.concentration
    inside = x.clamp_min(0.0)
    return torch.where(x < 0, -math.inf, -(1 + 1 / c) * torch.log1p(c * inside / d.scale) - d.scale.log())


def _von_mises_density(d: dist.VonMises, x: Tensor) -> Tensor:
    """Return the log-density; torch's has seven digits, from a polynomial for the Bessel function."""
    c = d.concentration
    on_circle = c * (torch.cos(x - d.loc) - 1) - torch.special.i0e(c).log() - math.log(2 * math.pi)
    return torch.where(x.abs() <= math.pi, on_circle, -math.inf)


def _relaxed_logit_density(d: LogitRelaxedBernoulli, x: Tensor) -> Tensor:
    """Return the log-density; torch's overflows far below."""
    gap = d.logits - d.temperature * x
    return d.temperature.log() + logsigmoid(gap) + logsigmoid(-gap)


def one_hots(q: Distribution, p: Distribution) -> Reference:
    return sum_over(q, p, torch.eye(q.event_shape[0], dtype=torch.float64))


def count_vectors(q: Distribution, p: Distribution) -> Reference:
    n, size = q.total_count, q.event_shape[0]
    counts = [c for c in itertools.product(range(n + 1), repeat=size) if sum(c) == n]
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


def components(q: dist.Independent, p: dist.Independent) -> Reference:
    """Integrate the components on the line, and sum."""
    each = line(q.base_dist, p.base_dist)
    return Reference(*(part.sum(-1) for part in each))


def base_normals(q: dist.LogisticNormal, p: dist.LogisticNormal) -> Reference:
    """Take the Normals behind the injective transform."""
    return components(q.base_dist, p.base_dist)


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
    """One family: how to build it, its parameters, and its KL from the definition, without the formulas under test.

    Attributes:
        type: the class. Several entries may share it; the sweep over registered pairs takes the first of them.
        kl: (q, p) -> Reference, for unvalidated q and p in float64.
        spaces: the parameters.
        build: takes the parameters, and `validate_args`, by keyword; the class by default.
        form: distinguishes the entry from others of its class.
        sweep: spaces for the sweep alone, such as one where a closed form exists.
        sweep_p: spaces for the sweep alone, for p, whose support must contain the support of q.
        digits: the limit of the digits of its KL: one special function, or a difference of several; see `target`.
        dtype: float64 wherever torch can.
        defects: what torch does wrong, "sample" or "rsample", and what its constructor does not take: parameters in
            "half" precision, a "nan", or a "trace", for which it may ask for no value of a tensor.
    """

    type: type[Distribution]
    kl: Callable[[Any, Any], Reference]
    spaces: dict[str, Space] = field(hash=False)
    build: Callable[..., Distribution] | None = None
    form: str = ""
    sweep: dict[str, Space] = field(hash=False, default_factory=dict)
    sweep_p: dict[str, Space] = field(hash=False, default_factory=dict)
    digits: Literal["plain", "special", "joint"] = "plain"
    dtype: torch.dtype = torch.float64
    defects: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The name of its tests."""
        return f"{self.type.__name__}({self.form})" if self.form else self.type.__name__

    @property
    def size(self) -> int:
        """The number of raw numbers of one distribution."""
        return sum(space.size for space in self.spaces.values())

    def __call__(self, raw: Tensor, **options: Any) -> Distribution:
        """Return the distribution of raw numbers `[*batch, size]`; gradients flow back to them."""
        parts = raw.split([space.size for space in self.spaces.values()], -1)
        parameters = {name: space.of(part) for (name, space), part in zip(self.spaces.items(), parts, strict=True)}
        return self.of(parameters, **options)

    def of(self, parameters: dict[str, Tensor], **options: Any) -> Distribution:
        """Return the distribution of these parameters."""
        return (self.build or self.type)(**parameters, **options)

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


def _uniform(low: Tensor, width: Tensor, validate_args: bool | None = None) -> Distribution:
    return dist.Uniform(low, low + width, validate_args=validate_args)


def _independent(loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> Distribution:
    return dist.Independent(dist.Normal(loc, scale, validate_args=validate_args), 1, validate_args=validate_args)


def _exp_of_normal(loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> Distribution:
    base = dist.Normal(loc, scale, validate_args=validate_args)
    return dist.TransformedDistribution(base, [dist.ExpTransform()], validate_args=validate_args)


def _standard_normal(like: Tensor, validate_args: bool | None = None) -> Distribution:
    return StandardNormal(like.shape, dtype=like.dtype, device=like.device)


def without(*abilities: str) -> frozenset[str]:
    return frozenset(abilities)


FAMILIES = [
    Family(dist.Bernoulli, Counts(2), {"probs": unit}),
    Family(dist.Bernoulli, Counts(2), {"logits": real}, form="logits"),
    Family(dist.Beta, interval, {"concentration1": concentration, "concentration0": concentration}, digits="joint"),
    Family(dist.Binomial, Counts(6), {"total_count": fixed(5, constant=True), "probs": unit}),
    Family(dist.Binomial, Counts(6), {"total_count": fixed(5, constant=True), "logits": real}, form="logits"),
    Family(dist.Categorical, Counts(4), {"logits": logits}, form="logits", digits="special"),
    Family(dist.Categorical, Counts(4), {"probs": simplex}, digits="special"),
    Family(dist.Cauchy, line, {"loc": real, "scale": positive}),
    Family(dist.Chi2, half_line, {"df": scalar(lambda raw: 3 * raw.exp())}),
    Family(dist.ContinuousBernoulli, interval, {"logits": real}, form="logits", digits="joint"),
    Family(dist.ContinuousBernoulli, interval, {"probs": unit}, digits="joint"),
    Family(dist.Dirichlet, stick_breaking, {"concentration": concentrations}, digits="joint"),
    Family(dist.Exponential, half_line, {"rate": positive}),
    Family(
        dist.FisherSnedecor,
        half_line,
        {"df1": scalar(lambda raw: 3 * raw.exp()), "df2": positive},
        sweep={"df1": between(3, 6), "df2": between(5, 9)},
        defects=without("nan"),
    ),
    Family(dist.Gamma, half_line, {"concentration": positive, "rate": positive}, digits="special"),
    Family(
        dist.GeneralizedPareto,
        Line(half_line.ends, _generalized_pareto_density),
        {"loc": fixed(0.0), "scale": positive, "concentration": unit},
        sweep={"loc": positive, "concentration": between(-0.4, 0.4)},
        dtype=torch.float32,  # its log_prob compares with a constant of the default dtype
    ),
    Family(dist.Geometric, Counts(1000), {"probs": unit}),
    Family(dist.Geometric, Counts(1000), {"logits": real}, form="logits"),
    Family(dist.Gumbel, line, {"loc": real, "scale": positive}, digits="special"),
    Family(dist.HalfCauchy, half_line, {"scale": positive}),
    Family(dist.HalfNormal, half_line, {"scale": positive}),
    Family(dist.Independent, components, {"loc": reals, "scale": positives}, _independent),
    Family(dist.InverseGamma, half_line, {"concentration": concentration, "rate": positive}, digits="special"),
    Family(
        dist.Kumaraswamy,
        Line(interval.ends, _kumaraswamy_density),
        {"concentration1": concentration, "concentration0": concentration},
        sweep={"concentration1": fixed(1.5)},
        digits="joint",
    ),
    Family(
        dist.LKJCholesky,
        partial_correlations,
        {"concentration": concentration},
        partial(dist.LKJCholesky, 3),
        digits="joint",
        # From three dimensions on its sample follows another law than the density.
        defects=without("sample", "nan", "trace"),
    ),
    Family(dist.Laplace, line, {"loc": real, "scale": positive}),
    Family(dist.LogNormal, half_line, {"loc": real, "scale": positive}),
    Family(LogVarNormal, line, {"loc": real, "logvar": real}),
    Family(Logistic, line, {"loc": real, "scale": positive}, sweep={"scale": fixed(1.5)}),
    Family(dist.LogisticNormal, base_normals, {"loc": reals, "scale": positives}),
    Family(
        LogitRelaxedBernoulli,
        Line(lambda d: (-math.inf, d.logits / d.temperature, math.inf), _relaxed_logit_density),
        {"temperature": concentration, "logits": real},
        sweep={"temperature": fixed(1.5)},
    ),
    Family(
        dist.LowRankMultivariateNormal,
        gaussians,
        {"loc": reals, "cov_factor": columns, "cov_diag": positives},
        defects=without("half", "nan"),
    ),
    Family(
        dist.MixtureSameFamily,
        Line(lambda d: (-math.inf, *d.component_distribution.loc.sort(-1).values.unbind(-1), math.inf)),
        {"logits": reals, "loc": reals, "scale": positives},
        _mixture,
    ),
    Family(
        dist.Multinomial,
        count_vectors,
        {"logits": logits},
        partial(dist.Multinomial, 4),
        form="logits",
        digits="special",
        defects=without("nan"),
    ),
    Family(dist.Multinomial, count_vectors, {"probs": simplex}, partial(dist.Multinomial, 3), digits="special"),
    Family(dist.MultivariateNormal, gaussians, {"loc": reals, "scale_tril": factor}),
    Family(
        dist.NegativeBinomial,
        Counts(1000),
        {"total_count": fixed(4, constant=True), "probs": unit},
        digits="joint",
    ),
    Family(dist.Normal, line, {"loc": real, "scale": positive}),
    Family(dist.OneHotCategorical, one_hots, {"probs": simplex}, digits="special", defects=without("nan")),
    Family(dist.OneHotCategoricalStraightThrough, one_hots, {"logits": logits}, digits="special"),
    Family(
        dist.Pareto,
        Line(lambda d: (d.scale, math.inf)),
        {"scale": positive, "alpha": positive},
        sweep={"alpha": between(2.5, 5)},
        sweep_p={"scale": between(0.05, 0.15), "alpha": positive},
    ),
    Family(dist.Poisson, Counts(200), {"rate": positive}),
    Family(RawCategorical, Counts(4), {"logits": logits}, digits="special"),
    Family(dist.RelaxedBernoulli, interval, {"temperature": concentration, "logits": real}),
    Family(
        dist.RelaxedOneHotCategorical,
        two_classes,
        {"logits": Space(2, lambda raw: 2 * raw)},
        partial(dist.RelaxedOneHotCategorical, torch.tensor(1.5, dtype=torch.float64)),
    ),
    Family(StandardNormal, line, {"like": fixed(0.0, constant=True)}, _standard_normal),
    Family(
        dist.StudentT,
        line,
        {"df": positive, "loc": real, "scale": positive},
        sweep={"df": between(3, 6)},
        defects=without("nan"),
    ),
    Family(dist.TransformedDistribution, half_line, {"loc": real, "scale": positive}, _exp_of_normal),
    Family(
        dist.Uniform,
        Line(lambda d: (d.low, d.high)),
        {"low": scalar(lambda raw: 2 * raw - 0.1), "width": positive},
        _uniform,
        sweep={"low": between(0.2, 0.4), "width": between(0.3, 0.5)},
        sweep_p={"low": between(-2, -1), "width": between(4, 5)},
    ),
    Family(
        dist.VonMises,
        Line(lambda d: (-math.pi, math.pi), _von_mises_density),
        {"loc": real, "concentration": concentration},
        digits="special",
    ),
    Family(dist.Weibull, half_line, {"scale": positive, "concentration": positive}, digits="special"),
    Family(
        dist.Wishart,
        wisharts,
        {"df": scalar(lambda raw: 4 + raw.exp()), "scale_tril": factor},
        digits="joint",
        # Its rsample writes in place to what its own derivative needs.
        defects=without("rsample", "nan", "trace"),
    ),
]
