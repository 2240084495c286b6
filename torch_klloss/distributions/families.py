"""One-line constructors for the usual distributions of losses."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal, constraints
from torch.distributions.utils import lazy_property

from torch_klloss.distributions.tensors import dtype_and_device_of
from torch_klloss.numerics.arguments import check_tensors
from torch_klloss.numerics.devices import can_be_read


class LogVarNormal(Normal):
    """A Normal that keeps the log-variance it was built from, and takes its exponential on demand.

    Args:
        loc: the mean.
        logvar: the logarithm of the variance, of the same shape.
        validate_args: as in torch.
    """

    def __init__(self, loc: Tensor, logvar: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.logvar = loc, logvar
        Distribution.__init__(self, loc.shape, validate_args=False)
        del self._validate_args  # back to the class's, that is torch's, setting
        if validate_args is not None:
            self._validate_args = validate_args
        if self._validate_args and _may_hold_nan(loc, logvar):
            Normal(loc, self.scale, validate_args=True)  # raises torch's own error

    @lazy_property
    def scale(self) -> Tensor:
        """The standard deviation."""
        return (0.5 * self.logvar).exp()

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogVarNormal:
        """Return the distribution with its batch dimensions expanded, the log-variance included."""
        new: LogVarNormal = self._get_checked_instance(LogVarNormal, _instance)
        LogVarNormal.__init__(new, self.loc.expand(batch_shape), self.logvar.expand(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        loc, logvar = (t if t.numel() == 1 else t.size() for t in (self.loc, self.logvar))
        return f"LogVarNormal(loc: {loc}, logvar: {logvar})"


class StandardNormal(LogVarNormal):
    """The Normal of mean zero and variance one, recognised by its type.

    Args:
        shape: its batch shape.
        dtype: of its parameters.
        device: of its parameters.
    """

    def __init__(self, shape: Any, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        self._zero = torch.zeros((), dtype=dtype, device=device)
        Distribution.__init__(self, shape, validate_args=False)
        del self._validate_args

    @property
    def loc(self) -> Tensor:  # type: ignore[override]
        """The mean."""
        return self._zero.expand(self._batch_shape)

    @property
    def logvar(self) -> Tensor:  # type: ignore[override]
        """The logarithm of the variance."""
        return self._zero.expand(self._batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> StandardNormal:
        """Return the distribution with its batch dimensions expanded."""
        new: StandardNormal = self._get_checked_instance(StandardNormal, _instance)
        new._zero = self._zero
        Distribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def __repr__(self) -> str:
        return f"StandardNormal({self._batch_shape})"


class RawCategorical(Categorical):
    """A Categorical that keeps its logits as given, and normalises them on demand.

    Args:
        logits: unnormalised log-probabilities, `[*batch, num_classes]`; -inf masks a class.
        validate_args: as in torch.
    """

    arg_constraints = {"raw_logits": constraints.real_vector}  # noqa: RUF012  (an instance variable in torch)

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.raw_logits = self._param = logits
        self._num_events = logits.shape[-1]
        Distribution.__init__(self, logits.shape[:-1], validate_args=False)
        del self._validate_args  # back to the class's, that is torch's, setting
        if validate_args is not None:
            self._validate_args = validate_args
        if self._validate_args and _may_hold_nan(logits):
            Distribution.__init__(self, logits.shape[:-1], validate_args=True)  # raises torch's own error

    @lazy_property
    def logits(self) -> Tensor:
        """The normalised log-probabilities."""
        return self.raw_logits - self.raw_logits.logsumexp(-1, keepdim=True)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RawCategorical:
        """Return the distribution with its batch dimensions expanded."""
        new: RawCategorical = self._get_checked_instance(RawCategorical, _instance)
        logits = self.raw_logits.expand(torch.Size(batch_shape) + self.raw_logits.shape[-1:])
        RawCategorical.__init__(new, logits, validate_args=False)
        new._validate_args = self._validate_args
        return new


def diagonal_normal(mean: Tensor, logvar: Tensor, batch_dims: int = 1) -> Independent[Normal]:
    """Build the posterior of a VAE: a Normal with independent components.

    All dimensions after the first `batch_dims` make up one event, whatever their number: `[batch, latent]`,
    `[batch, channels, height, width]`. The log-variance is kept as given, so that no closed form has to take the
    logarithm of its exponential.

    Args:
        mean: `[*batch, *event]`.
        logvar: the logarithm of the **variance** (twice that of the standard deviation), of the same shape.
        batch_dims: how many leading dimensions index the batch.

    Returns:
        An `Independent` of batch shape `[*batch]` and event shape `[*event]`.

    Raises:
        ValueError: if the shapes differ, `batch_dims` does not fit, or (with torch's validation on) a parameter is NaN.

    Examples:
        >>> import torch
        >>> from torch_klloss import AnalyticKL, diagonal_normal, standard_normal_like
        >>> q = diagonal_normal(mean=torch.ones(16, 8), logvar=torch.zeros(16, 8))
        >>> q.batch_shape, q.event_shape
        (torch.Size([16]), torch.Size([8]))
        >>> AnalyticKL()(q, standard_normal_like(q))
        tensor(4.)
    """
    check_tensors(mean=mean, logvar=logvar)
    if mean.shape != logvar.shape:
        raise ValueError(
            f"mean and logvar must have the same shape, got {tuple(mean.shape)} and {tuple(logvar.shape)}; a "
            "log-variance that is shared on purpose can be passed as logvar.expand_as(mean)."
        )
    if not isinstance(batch_dims, int) or not 0 <= batch_dims <= mean.dim():
        raise ValueError(
            f"batch_dims must lie between 0 and the number of dimensions of mean ({mean.dim()}), got {batch_dims!r}."
        )
    return _independent(LogVarNormal(mean, logvar), batch_dims)


def standard_normal_like(q: Distribution) -> Independent[Normal]:
    """Build the standard Normal with q's batch and event shape, dtype and device: the usual prior of a VAE.

    Args:
        q: a distribution of any type.

    Returns:
        An `Independent` over a Normal of mean zero and variance one.

    Raises:
        TypeError: if q is not a distribution.

    Examples:
        >>> import torch
        >>> from torch_klloss import diagonal_normal, standard_normal_like
        >>> p = standard_normal_like(diagonal_normal(torch.ones(16, 8), torch.zeros(16, 8)))
        >>> p.batch_shape, p.event_shape, p.variance.unique()
        (torch.Size([16]), torch.Size([8]), tensor([1.]))
    """
    if not isinstance(q, Distribution):
        raise TypeError(f"standard_normal_like takes a torch.distributions.Distribution, got {type(q).__name__}.")
    return _independent(StandardNormal(q.batch_shape + q.event_shape, *dtype_and_device_of(q)), len(q.batch_shape))


def categorical(logits: Tensor) -> RawCategorical:
    """Build a Categorical from raw logits, without the normalised copy that torch's constructor makes.

    Args:
        logits: unnormalised log-probabilities, `[*batch, num_classes]`; -inf masks a class.

    Raises:
        ValueError: if there is no dimension of classes, or (with torch's validation on) a logit is NaN.

    Warns:
        UserWarning: on the CPU in eager mode, if every row is at least 0 and sums to 1: these are probabilities, most
            likely. Equal logits, which mean the same either way, and rows of a 1 among zeros are accepted.

    Examples:
        >>> import torch
        >>> from torch_klloss import AnalyticKL, categorical
        >>> student, teacher = categorical(torch.zeros(5, 4)), categorical(torch.full((5, 4), 7.0))
        >>> AnalyticKL()(teacher, student)
        tensor(0.)
    """
    check_tensors(logits=logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one class in its last dimension, got shape {tuple(logits.shape)}.")
    if _are_probabilities(logits):
        warnings.warn(
            f"categorical takes raw logits, and every row of the last dimension of {tuple(logits.shape)} is at least "
            "0 and sums to 1, as probabilities do; their softmax is another distribution. For probabilities take "
            "torch.distributions.Categorical(probs), or categorical(probs.log()).",
            stacklevel=2,
        )
    return RawCategorical(logits)


def _are_probabilities(logits: Tensor) -> bool:
    """Return whether all rows are at least 0 and sum to 1, and one of them is neither uniform nor a single 1."""
    if not can_be_read(logits) or logits.numel() == 0:
        return False
    rows = logits.detach() if logits.is_floating_point() else logits.float()
    first = rows[(0,) * (rows.dim() - 1)]  # which tells logits apart without a look at all rows
    if not (_add_up(first) and _add_up(rows)):
        return False
    largest = rows.amax(-1)
    return bool(((largest < 1) & (largest > rows.amin(-1))).any())


def _add_up(probs: Tensor) -> bool:
    """Return whether all rows are at least 0 and sum to 1, up to the rounding of a softmax in float32 or less."""
    if probs.min() < 0:
        return False
    eps = max(torch.finfo(dtype).eps for dtype in (probs.dtype, torch.float32))
    rounding = 4 * eps * (1 + math.log(probs.shape[-1]))
    total = probs.sum(-1, dtype=torch.promote_types(probs.dtype, torch.float32))
    return bool(((total - 1).abs() <= rounding).all())


def _independent(base: Normal, batch_dims: int) -> Independent[Normal]:
    """Return the same as torch's constructor, without checks that cannot fail here: it runs in every training step."""
    d: Independent[Normal] = Independent.__new__(Independent)
    d.base_dist, d.reinterpreted_batch_ndims = base, len(base.batch_shape) - batch_dims
    shape = base.batch_shape
    Distribution.__init__(d, shape[:batch_dims], shape[batch_dims:], validate_args=False)
    del d._validate_args
    return d


def _may_hold_nan(*tensors: Tensor) -> bool:
    """Return whether a sum of the tensors is NaN, if it can be read: one pass, an elementwise check takes three."""
    return can_be_read(*tensors) and any(math.isnan(t.detach().sum().item()) for t in tensors)
