"""The exact KL, where a formula is registered."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.closed_forms.registry import Resolution, evaluate, has_formula, refuse, resolve
from torch_klloss.distributions.checks import check_pair
from torch_klloss.distributions.precision import in_floating_point
from torch_klloss.distributions.supports import check_log_prob
from torch_klloss.distributions.tensors import device_of, on_shared_device, unvalidated
from torch_klloss.estimate import KLEstimate
from torch_klloss.methods.base import BaseMethod
from torch_klloss.rng import private_rng

_OF_OTHERS = (IndexError, RuntimeError, TypeError, ValueError)  # of a log_prob at points that it does not take

# Classes whose own log_prob was seen to differ from the one that a rule was written for.
_DIFFERENT: weakref.WeakSet[type[Distribution]] = weakref.WeakSet()


@dataclass(frozen=True)
class ClosedForm(BaseMethod):
    """Compute KL(q‖p) by the registered closed form.

    Value and gradient are exact, for the parameters of q and of p alike. A subclass that overrides `log_prob`
    inherits the form of its parent only where its density agrees with the parent's at a few of its own points;
    otherwise there is no closed form for it, and a warning names the class.

    Examples:
        >>> from torch.distributions import Normal
        >>> from torch_klloss.methods import ClosedForm
        >>> ClosedForm().estimate(Normal(1.0, 1.0), Normal(0.0, 1.0)).value
        tensor(0.5000)
    """

    name: ClassVar[str] = "closed_form"

    def estimate_checked(
        self, q: Distribution, p: Distribution, batch_shape: torch.Size, generator: torch.Generator | None = None
    ) -> KLEstimate:
        """Return the exact KL, of the broadcast batch shape.

        Raises:
            NotImplementedError: if the pair has no closed form.
            ValueError: if q is discrete and p continuous, or the reverse; if a class's own `log_prob` returns another
                shape than one number for each point and batch element.
        """
        return KLEstimate(self.value_checked(q, p, batch_shape, 0), exact=True, method=self.name)

    def value_checked(
        self,
        q: Distribution,
        p: Distribution,
        batch_shape: torch.Size,
        num_summed: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the exact KL, summed over so many of its last dimensions; raises as `estimate_checked`."""
        resolution = resolve(q, p)
        if resolution is None or not _keep_densities(resolution):
            refuse(q, p)
        return evaluate(resolution, batch_shape, num_summed)

    def supports(self, q: Distribution, p: Distribution) -> bool:
        """Return whether the pair has a closed form."""
        batch_shape = check_pair(q, p)
        q, p = on_shared_device(q, p)
        resolution = resolve(in_floating_point(q), in_floating_point(p))
        return resolution is not None and _keep_densities(resolution) and has_formula(resolution, batch_shape)


def _keep_densities(resolution: Resolution) -> bool:
    """Return whether q, p and what they are transformed from have the densities that the rules are for."""
    return all(_keeps_density(d, parent) for d, parent in resolution.densities)


def _keeps_density(d: Distribution, parent: type[Distribution]) -> bool:
    """Return whether d has the density of `parent`, which the rule was written for."""
    cls = type(d)
    if cls.log_prob is parent.log_prob or parent.log_prob is Distribution.log_prob:
        return True  # nothing is overridden, or the rule is for an abstract family, which has no density to compare
    if torch.compiler.is_compiling() or cls in _DIFFERENT:
        return False
    try:
        with torch.no_grad(), private_rng(0, device_of(d)):
            x = d.sample(torch.Size((4,)))
            if _agree(unvalidated(d), parent, x):
                return True
    except (NotImplementedError, RuntimeError):  # cannot be drawn from, or not under vmap: nothing is known
        return False
    _DIFFERENT.add(cls)
    warnings.warn(
        f"{cls.__name__} overrides log_prob, and its density is not that of {parent.__name__}: it does not inherit "
        f"the closed form of {parent.__name__}. Give it one of its own with @register_kl, or let AutoKL sample.",
        stacklevel=2,
    )
    return False


def _agree(d: Distribution, parent: type[Distribution], x: Tensor) -> bool:
    """Return whether d has the density of its parent at points of its own, as far as both can evaluate these.

    A class whose points have another form than its parent's, such as the one-hot vectors of a Categorical, or whose
    log_prob does not take several draws, inherits the parent's closed form, as it does in `kl_divergence`.
    """
    try:
        own = d.log_prob(x)
    except _OF_OTHERS as error:
        if isinstance(error, NotImplementedError):
            raise
        return True
    check_log_prob(d, own, x.shape[:1] + d.batch_shape)
    try:
        inherited = parent.log_prob(d, x)
    except _OF_OTHERS:  # or the parent is abstract, and has no density
        return True
    if inherited.shape != own.shape:
        return True
    tolerance = 100 * torch.finfo(own.dtype).eps
    return torch.allclose(own, inherited, rtol=tolerance, atol=tolerance, equal_nan=True)
