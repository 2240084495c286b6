"""Registration of a closed form that is one formula of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.closed_forms.registry import register_kl
from torch_klloss.numerics.blocks import Derivatives
from torch_klloss.numerics.custom_gradient import Formula, Kernel, Partials, formula_of, kernel_of
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.elementary import nan_below_zero
from torch_klloss.numerics.quick_kernels import Direct, Quick, direct_or_careful, quick_or_careful, whole_or_careful


def register_formula(
    cls: type[Distribution],
    *names: str,
    partials: Partials | None = None,
    quick: Quick | None = None,
    direct: Direct | None = None,
    whole: Kernel | None = None,
    event_dims: int = 0,
    needs_float64: bool = False,
    guards: Sequence[str] | None = None,
) -> Callable[[Any], Formula]:
    """Register the decorated function as the closed form of two members of a family.

    It takes the parameters of q and then those of p, and the runner of `formula_of` executes it, with the sum over
    latent dimensions taken on the way.

    Args:
        cls: the family.
        names: the attributes that hold the parameters.
        partials: the derivatives by all parameters, as `custom_gradient` takes them; without them the function is a
            kernel, which takes the flags first and returns them too.
        quick: a kernel for parameters that are not at their ends, as `quick_or_careful` takes it.
        direct: a kernel for terms that do not cancel, as `direct_or_careful` takes it.
        whole: a kernel of few operations, for what was given in float32 on an accelerator that has float64.
        event_dims: how many of the last dimensions of the parameters make up an event.
        needs_float64: whether it computes in float64 on every device.
        guards: parameters such as "p.scale" that have to be made NaN below zero so that the KL is. Of the others the
            formula makes it itself. Without it the registry masks the KL where a parameter is outside of its domain.
    """

    def decorator(function: Any) -> Formula:
        kernel: Kernel = function if partials is None else kernel_of(function, partials)
        if quick is not None:
            kernel = quick_or_careful(quick, kernel)
        if direct is not None:
            kernel = direct_or_careful(direct, kernel)
        if whole is not None:
            kernel = whole_or_careful(whole, kernel)
        if guards is not None:
            kernel = _guarded(kernel, [f"{side}.{name}" in guards for side in "qp" for name in names])
        opaque = None if direct is None else cls.__name__
        formula = formula_of(kernel, event_dims=event_dims, partials=partials, opaque=opaque)

        def summed(q: Distribution, p: Distribution, num_summed: int) -> Tensor:
            return formula(*_parameters(q, names), *_parameters(p, names), num_summed=num_summed)

        def rule(q: Distribution, p: Distribution) -> Tensor:
            return summed(q, p, 0)

        rule.__doc__, rule.__wrapped__ = function.__doc__, function  # type: ignore[attr-defined]
        rule.is_nan_outside = guards is not None  # type: ignore[attr-defined]
        register_kl(cls, cls, summed=summed, needs_float64=needs_float64)(rule)
        return formula

    return decorator


def _parameters(d: Distribution, names: Sequence[str]) -> list[Tensor]:
    return [getattr(d, name) for name in names]


def _guarded(kernel: Kernel, flags: Sequence[bool]) -> Kernel:
    """Return a kernel that makes the flagged parameters NaN below zero, where nobody looks at them beforehand."""

    @wraps(kernel)
    def guarded(needs: Sequence[bool], *tensors: Tensor) -> tuple[Tensor, Derivatives]:
        if can_be_read(tensors[0]):
            return kernel(needs, *tensors)
        return kernel(needs, *(nan_below_zero(t) if flag else t for t, flag in zip(tensors, flags, strict=True)))

    return guarded
