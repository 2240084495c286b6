"""The KL of one level of latents, for every element, and for every dimension if it splits."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from torch_klloss.distributions.checks import check_pair, type_name
from torch_klloss.distributions.families import LogVarNormal, StandardNormal
from torch_klloss.distributions.reach import check_dropped
from torch_klloss.distributions.simplify import flatten_independent, peel
from torch_klloss.distributions.tensors import device_of
from torch_klloss.losses import KLLoss
from torch_klloss.methods import ClosedForm, FirstOf
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.tracing import is_traced
from torch_klloss.reduction import Batch
from torch_klloss.rng import private_rng, rng_state

_LARGEST_LOGVAR = 80.0  # exp(88.8) is infinite in float32


@dataclass(frozen=True)
class Divergence:
    """The KL of the elements of a batch.

    Attributes:
        value: `[*elements, …]`; dimensions after the elements are latent ones, still to be summed.
        per_dimension: `[*elements, *latent]`, the same tensor object if both come from one evaluation; None if the KL
            does not split.
    """

    value: Tensor
    per_dimension: Tensor | None

    def reduce(self, batch: Batch, reduction: str, averages: Tensor | None) -> Tensor:
        """Reduce the KL of the examples, given the batch means of its dimensions."""
        if averages is not None and reduction == "mean" and self.value is self.per_dimension:
            return averages.sum()
        return batch.total(self.value, reduction)


def divergence(
    kl: KLLoss,
    q: Distribution,
    p: Distribution,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    reduction: str,
    must_split: bool = False,
) -> Divergence:
    """Return the KL of the elements of a batch, and tell the observers of `kl`.

    Args:
        kl: the loss that computes it, with reduction="none".
        q: the posterior, `[*elements, …]`.
        p: the prior.
        batch: which elements count.
        generator: where a sampling method takes its randomness from.
        reduction: how the KL is reduced for the observers.
        must_split: whether the loss depends on the single dimensions: a sampling method then draws for them anew.
            Otherwise they are only reported, from draws that are always the same and leave the caller's random
            stream as it is.

    Raises:
        ValueError: if `must_split` and the KL does not split.
    """
    batch_shape = check_pair(q, p)
    q, p = batch.replace(q, batch_shape), batch.replace(p, batch_shape)
    if not kl.observers:
        return _divergence(kl, q, p, batch, generator, must_split)
    random_state = rng_state(device_of(q), generator)
    with kl.unobserved():
        found = _divergence(kl, q, p, batch, generator, must_split)
    kl.tell(q, p, batch, batch.total(found.value.detach(), reduction), reduction, random_state)
    return found


def _divergence(
    kl: KLLoss, q: Distribution, p: Distribution, batch: Batch, generator: torch.Generator | None, must_split: bool
) -> Divergence:
    moments = moments_of(q, p)
    if moments is not None and is_plain_normal(kl, *moments) and not _is_extreme(*moments):
        terms: Tensor = _NormalTerms.apply(*moments)
        call_hooks(kl, q, p, batch)
        return Divergence(terms, terms)
    _warn_of_extreme_logvar(q)
    value = _values(kl, q, p, batch, generator)
    if batch.weights is not None:
        check_dropped(value, batch.weights != 0, q, p)
    split = _split(kl, q, p, len(batch.elements), generator, is_report=not must_split)
    if split is None and must_split:
        raise ValueError(
            "free nats of dimensions, or of groups of them, need a KL that splits into dimensions, which "
            f"KL({type_name(q)}‖{type_name(p)}) does not: use free_nats_per='example', or 'group' without groups."
        )
    return Divergence(value, split)


def _values(kl: KLLoss, q: Distribution, p: Distribution, batch: Batch, generator: torch.Generator | None) -> Tensor:
    """Return the KL `[*elements, …]` of a pair without masked elements, by a call that the hooks of `kl` see."""
    if not batch.has_parts:
        return kl(q, p, mask=None if batch.weights is None else batch.weights != 0, generator=generator)
    if not is_hooked(kl):
        return kl.estimate(q, p, generator).value
    elementwise: Any = copy.copy(kl)  # has the same hooks
    elementwise.forward = lambda q, p, mask=None, generator=None: kl.estimate(q, p, generator).value
    value: Tensor = elementwise(q, p, generator=generator)
    return value


def call_hooks(kl: KLLoss, q: Distribution, p: Distribution, batch: Batch) -> None:
    """Call the loss once for the user's forward hooks, after its KL was computed without a call.

    Only for methods that draw nothing: training is then bit for bit the same with and without hooks.
    """
    if is_hooked(kl):
        with torch.no_grad(), kl.unobserved():
            _values(kl, q, p, batch, None)


def is_hooked(kl: KLLoss) -> bool:
    """Return whether the loss has forward hooks beside those that tell its observers."""
    if not (kl._forward_pre_hooks or kl._forward_hooks):
        return False
    hooks = *kl._forward_pre_hooks.values(), *kl._forward_hooks.values()
    return any(hook not in kl._observer_hooks for hook in hooks)


def is_plain_normal(kl: KLLoss, mean: Tensor, logvar: Tensor) -> bool:
    """Return whether the loss takes the closed form of the usual pair, in eager float32 on the CPU."""
    method = kl.method
    if type(method.methods[0] if type(method) is FirstOf else method) is not ClosedForm:
        return False
    is_float32 = mean.dtype == logvar.dtype == torch.float32
    return is_float32 and mean.shape == logvar.shape and mean.numel() > 0 and can_be_read(mean, logvar)


def moments_of(q: Distribution, p: Distribution) -> tuple[Tensor, Tensor] | None:
    """Return mean and log-variance of q in the usual pair, `diagonal_normal` and its standard Normal; else None."""
    if not (type(q) is type(p) is Independent) or q.batch_shape != p.batch_shape:
        return None
    normal, standard = q.base_dist, p.base_dist
    if type(normal) is not LogVarNormal or type(standard) is not StandardNormal or not q.event_shape:
        return None
    return normal.loc, normal.logvar


def _split(
    kl: KLLoss, q: Distribution, p: Distribution, num_elements: int, generator: torch.Generator | None, is_report: bool
) -> Tensor | None:
    """Return the KL of the single latent dimensions; None if the KL does not split."""
    q, p, _ = peel(q, p)
    if len(check_pair(q, p)) <= num_elements:
        return None
    if not is_report or is_traced():
        return kl.estimate(q, p, generator).value
    with private_rng(0, device_of(q)):
        return kl.estimate(q, p).value


class _NormalTerms(torch.autograd.Function):
    """Compute ½ (μ² + exp(v) - 1 - v), with the difference in float64: near v = 0 float32 would need a series."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, logvar: Tensor) -> Tensor:
        wide = logvar.double()
        growth = torch.expm1(wide)
        ctx.save_for_backward(loc, logvar)
        ctx.growth = growth.float()
        return growth.sub_(wide).clamp_(min=0).float().addcmul_(loc, loc).mul_(0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        loc, logvar = ctx.saved_tensors
        by_loc = grad * loc if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return by_loc, None
        # A second derivative needs the first one in the graph.
        growth = logvar.expm1() if torch.is_grad_enabled() else ctx.growth
        return by_loc, (grad * 0.5) * growth


def _is_extreme(mean: Tensor, logvar: Tensor) -> bool:
    """Return whether a log-variance is out of bounds or a parameter is NaN, unless torch's validation is off."""
    if not Distribution._validate_args:
        return False
    return is_out_of_bounds(logvar.detach()) or math.isnan(mean.detach().sum().item())


def is_out_of_bounds(logvar: Tensor) -> bool:
    """Return whether a log-variance is beyond ±80 or NaN."""
    low, high = torch.aminmax(logvar)
    return not (low.item() >= -_LARGEST_LOGVAR and high.item() <= _LARGEST_LOGVAR)


def _warn_of_extreme_logvar(q: Distribution) -> None:
    q, _ = flatten_independent(q)
    if not isinstance(q, LogVarNormal) or isinstance(q, StandardNormal) or not can_be_read(q.logvar):
        return
    if q.logvar.numel() > 0 and _is_extreme(torch.zeros(()), q.logvar):
        warnings.warn(
            "logvar should stay within ±80, got values beyond: a variance of exp(±80) means that training diverges, or "
            "that something other than the logarithm of a variance was passed. Lower the learning rate, or clamp it.",
            stacklevel=2,
        )
