"""The losses of this library, one a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch_klloss.distributions.checks import built_first
from torch_klloss.losses.base import KLLoss
from torch_klloss.methods import ClosedForm, Enumeration, FirstOf, Method, MonteCarlo, Quadrature
from torch_klloss.methods.first_of import Refuse, WarnFirst
from torch_klloss.methods.monte_carlo.method import Gradient, Value
from torch_klloss.methods.monte_carlo.mixed import MixedGradient
from torch_klloss.numerics.arguments import settings_of
from torch_klloss.reduction import ReductionName
from torch_klloss.samplers import IID, Sampler

OnFallback = Literal["allow", "warn", "error"]


class AnalyticKL(KLLoss):
    """The KL by its closed form: exact in value and in gradient. See `KLLoss` for shapes and reduction.

    A pair without a closed form raises a `NotImplementedError` that names the pair and what to use instead.

    Examples:
        >>> from torch.distributions import Normal
        >>> from torch_klloss import AnalyticKL
        >>> AnalyticKL()(Normal(1.0, 1.0), Normal(0.0, 1.0))
        tensor(0.5000)
    """

    @built_first
    def __init__(self, *, reduction: ReductionName = "mean", batch_dims: int = 1) -> None:
        super().__init__(ClosedForm(), reduction=reduction, batch_dims=batch_dims)

    def _settings(self) -> dict[str, object]:
        return {}


class MonteCarloKL(KLLoss):
    """The KL estimated from samples of q: unbiased in value and in gradient. See `KLLoss` for shapes and reduction.

    `MonteCarlo` documents each `gradient` and `value`, and the combinations that are refused. `estimate(q, p)` gives
    the standard error.

    Args:
        num_samples: how many points are drawn for every batch element.
        sampler: the source of the points, by default independent draws.
        gradient: "auto" (pathwise where q has `rsample`, else the score function), "pathwise",
            "sticking_the_landing", "mixed", "score_function" or "none"; or a `MixedGradient()`, whose memory of earlier
            steps is then part of the `state_dict`.
        value: "log_ratio", "entropy", "control_variate", "taylor", "k2" (biased) or "k3".
        chunk_size: how many draws are evaluated at once; None for all.
        reduction: as in `KLLoss`.
        batch_dims: as in `KLLoss`.

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal, StudentT
        >>> from torch_klloss import MonteCarloKL
        >>> loss = MonteCarloKL(num_samples=256, gradient="sticking_the_landing")
        >>> loss(Normal(torch.zeros(32, 4), 1.0), StudentT(4.0)).shape
        torch.Size([])
    """

    @built_first
    def __init__(
        self,
        num_samples: int = 1,
        *,
        sampler: Sampler | None = None,
        gradient: Gradient | MixedGradient = "auto",
        value: Value = "log_ratio",
        chunk_size: int | None = None,
        reduction: ReductionName = "mean",
        batch_dims: int = 1,
    ) -> None:
        method = MonteCarlo(num_samples, sampler=sampler, gradient=gradient, value=value, chunk_size=chunk_size)
        super().__init__(method, reduction=reduction, batch_dims=batch_dims)
        if isinstance(gradient, MixedGradient):
            self.mixture = gradient  # a submodule, so that its state is in the state_dict of the loss

    def _settings(self) -> dict[str, object]:
        settings = settings_of(self.method)
        return settings | {"sampler": None} if settings.get("sampler") == IID() else settings


class QuadratureKL(KLLoss):
    """The KL of one-dimensional pairs by a quadrature that certifies its error. See `KLLoss` for shapes.

    It is deterministic, with value and gradient right to `rtol`. A batch with an element that it cannot certify raises
    a `NotCertifiedError`, a pair that does not simplify to one dimension a `NotImplementedError`. See `Quadrature`.

    Args:
        num_nodes: how many nodes the first rule has.
        rtol: the relative error that is certified.
        reduction: as in `KLLoss`.
        batch_dims: as in `KLLoss`.

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal, StudentT
        >>> from torch_klloss import QuadratureKL
        >>> QuadratureKL()(Normal(torch.zeros(32, 4), 1.0), StudentT(4.0))
        tensor(0.1851)
    """

    @built_first
    def __init__(
        self,
        num_nodes: int = 64,
        *,
        rtol: float = 1e-6,
        reduction: ReductionName = "mean",
        batch_dims: int = 1,
    ) -> None:
        super().__init__(Quadrature(num_nodes, rtol=rtol), reduction=reduction, batch_dims=batch_dims)

    def _settings(self) -> dict[str, object]:
        return settings_of(self.method)


class AutoKL(KLLoss):
    """The exact KL where that is possible, and the fallback's otherwise. See `KLLoss` for shapes and reduction.

    The closed form is taken where one is registered, an exact sum where q's support is finite and small, and the
    fallback otherwise. `route(q, p)` says which. `AutoKL(fallback=[Quadrature(), MonteCarlo(64)])` also takes certified
    integrals and infinite sums, and samples only where there is neither.

    Args:
        fallback: a method, or a sequence of methods that are tried in turn; by default `MonteCarlo(1)`.
        on_fallback: "allow", "warn" (a warning names the pair and the route) or "error" (a `NotImplementedError`).
        reduction: as in `KLLoss`.
        batch_dims: as in `KLLoss`.

    Raises:
        ValueError: if `on_fallback` is unknown.

    Examples:
        >>> from torch.distributions import Binomial, Normal, Poisson, StudentT
        >>> from torch_klloss import AutoKL
        >>> AutoKL().route(Normal(0.0, 1.0), Normal(1.0, 1.0))
        'closed_form'
        >>> AutoKL().route(Binomial(3, 0.5), Poisson(1.0))
        'enumeration'
        >>> AutoKL().route(Normal(0.0, 1.0), StudentT(4.0))
        'monte_carlo'
    """

    @built_first
    def __init__(
        self,
        fallback: Method | Sequence[Method] | None = None,
        *,
        on_fallback: OnFallback = "allow",
        reduction: ReductionName = "mean",
        batch_dims: int = 1,
    ) -> None:
        if on_fallback not in get_args(OnFallback):
            raise ValueError(f"on_fallback must be 'allow', 'warn' or 'error', got {on_fallback!r}.")
        fallback = MonteCarlo(1) if fallback is None else fallback
        fallbacks = tuple(fallback) if isinstance(fallback, Sequence) else (fallback,)
        if on_fallback == "warn":
            fallbacks = (WarnFirst(FirstOf(*fallbacks)),)
        elif on_fallback == "error":
            fallbacks = (Refuse(FirstOf(*fallbacks)),)
        exact = ClosedForm(), Enumeration(max_terms=0)
        super().__init__(FirstOf(*exact, *fallbacks), reduction=reduction, batch_dims=batch_dims)

    def _settings(self) -> dict[str, object]:
        if not isinstance(self.method, FirstOf):
            return super()._settings()
        fallbacks, on_fallback = self.method.methods[2:], "allow"
        if isinstance(careful := fallbacks[0], WarnFirst | Refuse):
            on_fallback = "warn" if isinstance(careful, WarnFirst) else "error"
            fallbacks = careful.method.methods if isinstance(careful.method, FirstOf) else (careful.method,)
        fallback = fallbacks[0] if len(fallbacks) == 1 else list(fallbacks)
        return {"fallback": None if fallback == MonteCarlo(1) else fallback, "on_fallback": on_fallback}
