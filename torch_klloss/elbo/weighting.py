"""Free nats and balanced gradients: changes of the KL before it is weighted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from torch_klloss.distributions.reach import has_hidden_parameters
from torch_klloss.distributions.tensors import copy_with, tensors_of
from torch_klloss.numerics.arguments import check_integer, check_number
from torch_klloss.numerics.once import constant_in

FreeNatsPer = Literal["example", "dimension", "group"]

_ONCE = "ELBOLoss(balance=...) scales derivatives of the KL that cannot be differentiated again; use balance=None."


@dataclass(frozen=True)
class FreeNats:
    """A number of nats λ that cost nothing: a smaller KL is raised to λ, and has no gradient there.

    - "example": Σ_n max(KL_n, λ) / N, each example by itself.
    - "dimension": Σ_j max(mean_n KL_nj, λ); the mean over the batch comes before the maximum.
    - "group": Σ_g max(mean_n Σ_{j in g} KL_nj, λ). A group is a level, a (q, p) pair, or one of `groups` equal runs of
      its dimensions: `groups` = channels for a latent `[channels, height, width]`.

    Args:
        nats: λ ≥ 0.
        per: the sum that is raised: that of an example, of a dimension or of a group.
        groups: how many groups each level is divided into.

    References:
        *Improved variational inference with inverse autoregressive flow* (Kingma et al., 2016), appendix C.8.
    """

    nats: float
    per: FreeNatsPer = "example"
    groups: int | None = None

    def __post_init__(self) -> None:
        check_number("free_nats", self.nats)
        if not (math.isfinite(self.nats) and self.nats >= 0):
            raise ValueError(f"free_nats must be finite and at least 0, got {self.nats!r}.")
        if self.per not in get_args(FreeNatsPer):
            raise ValueError(f"free_nats_per must be 'example', 'dimension' or 'group', got {self.per!r}.")
        if self.groups is None:
            return
        if self.per != "group":
            raise ValueError(f"free_nats_groups needs free_nats_per='group', got {self.per!r}.")
        check_integer("free_nats_groups", self.groups)

    @property
    def must_split(self) -> bool:
        """Whether the KL is needed for every dimension."""
        return self.nats > 0 and (self.per == "dimension" or self.groups is not None)

    @property
    def uses_averages(self) -> bool:
        """Whether the mean over the batch comes before the maximum."""
        return self.nats > 0 and self.per != "example"

    def floor_averages(self, kl_per_level: Sequence[Tensor], averages: Sequence[Tensor | None]) -> Tensor:
        """Return the sum of the batch means of the levels, dimensions or groups, each raised to λ."""
        groups = kl_per_level
        if self.must_split:
            groups = [self._grouped(means.flatten()) for means in averages if means is not None]
        return torch.stack([group.clamp(min=self.nats).sum() for group in groups]).sum()

    def _grouped(self, means: Tensor) -> Tensor:
        if self.groups is None:
            return means
        if len(means) % self.groups:
            raise ValueError(
                f"free_nats_groups={self.groups} must divide the number of latent dimensions, which is {len(means)}."
            )
        return means.unflatten(0, (self.groups, -1)).sum(-1)


def balanced(q: Distribution, p: Distribution, prior_share: float) -> tuple[Distribution, Distribution]:
    """Return the pair with KL balancing: p's parameters get `prior_share` of the gradient, q's the rest.

    The same value and gradients as α KL(sg(q)‖p) + (1 - α) KL(q‖sg(p)) with the stop-gradients sg, from one evaluation
    and one set of draws. A distribution with parameters that are none of its tensors, such as a flow, is asked for its
    draws and its density alone: a closed form or a user's method cannot read the pair then.

    References:
        *Mastering Atari with discrete world models* (Hafner et al., 2021), section 2.
    """
    if not torch.is_grad_enabled():
        return q, p
    scaled_q, scaled_p = _with_scaled_gradient(q, 1 - prior_share), _with_scaled_gradient(p, prior_share)
    if _learns(scaled_q) and not _learns(scaled_p):
        warnings.warn(
            "balance needs a prior that learns, but no parameter of p requires a gradient: the KL's gradient to q is "
            f"only multiplied by {1 - prior_share:g}. Leave balance=None for a fixed prior.",
            stacklevel=2,
        )
    return scaled_q, scaled_p


def _learns(d: Distribution) -> bool:
    return isinstance(d, ScaledGradient) or any(t.requires_grad for t in tensors_of(d))


def _with_scaled_gradient(d: Distribution, factor: float) -> Distribution:
    if has_hidden_parameters(d):
        return ScaledGradient(d, factor)
    return copy_with(d, lambda t, *_: _ScaleGradient.apply(t, factor) if t.requires_grad else t)


class ScaledGradient(Distribution):
    """A distribution with the gradient to its parameters multiplied by a factor, whatever holds them.

    Args:
        d: the distribution.
        factor: the factor.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, d: Distribution, factor: float) -> None:
        self.scaled, self.factor = d, factor
        super().__init__(d.batch_shape, d.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """The support of the distribution."""
        return self.scaled.support

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether it has `rsample`."""
        return self.scaled.has_rsample

    def expand(self, batch_shape: Any, _instance: Any = None) -> ScaledGradient:
        """Return it with its batch dimensions expanded."""
        return ScaledGradient(self.scaled.expand(batch_shape), self.factor)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws without a gradient."""
        return self.scaled.sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws, whose gradient is scaled."""
        return _scaled(self.scaled.rsample(torch.Size(sample_shape)), self.factor)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, with a scaled gradient to the parameters and the whole one to the points."""
        by_parameters = _scaled(self.scaled.log_prob(value.detach()), self.factor - 1)
        return self.scaled.log_prob(value) + (by_parameters - by_parameters.detach())

    def entropy(self) -> Tensor:
        """Return the entropy, whose gradient is scaled."""
        return _scaled(self.scaled.entropy(), self.factor)


def _scaled(t: Tensor, factor: float) -> Tensor:
    scaled: Tensor = _ScaleGradient.apply(t, factor)
    return scaled


class _ScaleGradient(torch.autograd.Function):
    """Return t, with its gradient multiplied by `factor`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, factor: float) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return constant_in(grad * ctx.factor, grad, _ONCE), None
