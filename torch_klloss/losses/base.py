"""The base of the loss modules, which reduces what a method computes and tells its observers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils.hooks import RemovableHandle

from torch_klloss.distributions.batch_dims import replace_examples
from torch_klloss.distributions.checks import built_first, check_pair, type_name
from torch_klloss.distributions.precision import in_full_precision, pair_in_full_precision
from torch_klloss.distributions.reach import check_dropped, hidden_parameters
from torch_klloss.distributions.tensors import device_of, dtype_of, tensors_of
from torch_klloss.estimate import KLEstimate
from torch_klloss.methods import Method
from torch_klloss.methods.base import as_method
from torch_klloss.numerics.arguments import call_of, check_generator
from torch_klloss.numerics.tracing import is_autocast_enabled, is_in_backward, without_autocast
from torch_klloss.reduction import Batch, ReductionName, check_reduction, expand_mask, is_zero, reduce, reduce_estimate
from torch_klloss.rng import RngState, rng_state


@dataclass(frozen=True)
class Call:
    """One KL that a loss has computed, as its observers see it.

    Attributes:
        loss: the loss.
        q: the distribution that the expectation is under, with every masked element replaced by one that counts.
        p: the other one, likewise.
        batch: the examples and their weights.
        value: the reduced KL; for a loss inside of an `ELBOLoss` the KL in its terms.
        reduction: how the examples were reduced to it.
        random_state: where the random streams stood before.
    """

    loss: KLLoss
    q: Distribution
    p: Distribution
    batch: Batch
    value: Tensor
    reduction: str
    random_state: RngState


class Observer(Protocol):
    """An object that is told of every KL that a loss computes."""

    def observe(self, call: Call) -> None:
        """Take what is needed from the call; training's random streams must stay where they are."""


class KLLoss(nn.Module):
    """The KL(q‖p) that a method computes, reduced to a loss, in nats.

    Batch elements are `[*examples, *latent]`: the first `batch_dims` dimensions of the broadcast batch shape index
    independent examples, all further ones belong to one latent variable and are summed. "mean" is the mean of the
    per-example KLs; it never divides by the latent size. Bias and variance of value and gradient are the method's.

    Half-precision parameters are converted to float32, autocast is off inside, and the loss is float32.

    Args:
        method: an object with `estimate(q, p, generator=None) -> KLEstimate`.
        reduction: "mean", "sum" or "none" over the examples.
        batch_dims: how many leading batch dimensions index independent examples; all of them if a pair has fewer.

    Raises:
        TypeError: if `method` has no `estimate`.
        ValueError: if `reduction` is unknown or `batch_dims` negative.

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from torch_klloss import KLLoss
        >>> from torch_klloss.methods import ClosedForm
        >>> q = Normal(torch.ones(16, 8), 1.0)  # 16 examples, 8 latent dimensions
        >>> KLLoss(ClosedForm())(q, Normal(0.0, 1.0))
        tensor(4.)
        >>> mask = torch.arange(16) < 4
        >>> KLLoss(ClosedForm(), reduction="sum")(q, Normal(0.0, 1.0), mask=mask)
        tensor(16.)
    """

    @built_first
    def __init__(self, method: Method, *, reduction: ReductionName = "mean", batch_dims: int = 1) -> None:
        super().__init__()
        as_method(method)  # or a TypeError
        check_reduction(reduction, batch_dims)
        self.method = method
        self.reduction = reduction
        self.batch_dims = batch_dims
        self.observers: list[Observer] = []
        self._observer_hooks: tuple[Any, ...] = ()
        self._handles: tuple[RemovableHandle, ...] = ()
        self._random_states: list[RngState] = []

    def forward(
        self,
        q: Distribution,
        p: Distribution,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the reduced KL.

        Args:
            q: the distribution that the expectation is under, `[*examples, *latent]` + event.
            p: the other distribution; its batch shape broadcasts against q's.
            mask: bool or weights, of the shape `[*examples]` or broadcasting to it. "mean" divides by its sum. An
                example of weight zero gives zero value and zero gradient, even where its KL is inf or NaN.
            generator: the source of randomness of sampling methods; by default torch's global generator.

        Returns:
            A scalar, or `[*examples]` with reduction="none".

        Raises:
            TypeError: if q or p is not a distribution, the mask not a tensor, or the generator none.
            ValueError: if shapes do not fit, q is discrete and p continuous or the reverse, or "mean" has no example:
                an empty batch, or a mask that sums to zero (NaN under compile and vmap); or if a masked example is NaN
                inside of a network of q or p, such as a flow's, where it cannot be replaced.
            NotImplementedError: if the method has no route for the pair.
        """
        if self._is_observed():  # called past the hooks
            observed: Tensor = torch.compiler.disable(self._observed)(
                partial(KLLoss.forward, self), q, p, mask, generator
            )
            return observed
        q, p, mask = self.drop_masked(q, p, mask)
        if mask is not None and is_zero((mask != 0).sum()):
            value = _no_gradient(q, p).expand(mask.shape)
        else:
            value = self._per_example(q, p, generator)
        if mask is not None:
            check_dropped(value, mask != 0, q, p)
        return reduce(value, self.reduction, self.batch_dims, mask)

    if TYPE_CHECKING:  # torch's has no types

        def __call__(  # noqa: D102
            self,
            q: Distribution,
            p: Distribution,
            mask: Tensor | None = None,
            generator: torch.Generator | None = None,
        ) -> Tensor: ...

    def _per_example(self, q: Distribution, p: Distribution, generator: torch.Generator | None) -> Tensor:
        """Return the KL of every example, `[*examples]`."""
        check_generator(generator)
        batch_shape, method = check_pair(q, p), as_method(self.method)
        q, p = pair_in_full_precision(q, p)
        num_summed = max(0, len(batch_shape) - self.batch_dims)
        if not is_autocast_enabled():
            return method.value_checked(q, p, batch_shape, num_summed, generator)
        with without_autocast(device_of(q)):
            return method.value_checked(q, p, batch_shape, num_summed, generator)

    def drop_masked(
        self, q: Distribution, p: Distribution, mask: Tensor | None
    ) -> tuple[Distribution, Distribution, Tensor | None]:
        """Return the expanded mask, and the pair with every example of weight zero replaced by another example.

        The parameters of a masked example, even NaN, then reach neither a value nor a gradient.
        """
        if mask is None:
            return q, p, None
        batch_shape = check_pair(q, p)
        mask = expand_mask(mask, batch_shape[: self.batch_dims])
        keep = mask != 0
        return replace_examples(q, keep, batch_shape), replace_examples(p, keep, batch_shape), mask

    def estimate(self, q: Distribution, p: Distribution, generator: torch.Generator | None = None) -> KLEstimate:
        """Return the unreduced `KLEstimate`, of the broadcast batch shape, without mask and reduction."""
        check_generator(generator)
        if self._is_observed():  # not part of a call
            return torch.compiler.disable(self._observed)(
                lambda q, p, mask, generator: self.estimate(q, p, generator), q, p, None, generator
            )
        batch_shape, method = check_pair(q, p), as_method(self.method)
        q, p = pair_in_full_precision(q, p)
        with without_autocast(device_of(q)):
            return method.estimate_checked(q, p, batch_shape, generator)

    def reduce(self, estimate: KLEstimate, mask: Tensor | None = None) -> KLEstimate:
        """Return an estimate reduced as this loss does it: the batch mean or sum, with its standard error.

        Args:
            estimate: the result of `estimate`.
            mask: as in `forward`.

        Examples:
            >>> import torch
            >>> from torch.distributions import Normal
            >>> from torch_klloss import MonteCarloKL
            >>> loss = MonteCarloKL(num_samples=64)
            >>> estimate = loss.estimate(Normal(torch.ones(100, 8), 1.0), Normal(0.0, 1.0))
            >>> mean = loss.reduce(estimate)
            >>> bool(abs(mean.value - 4.0) < 6 * mean.std_error)
            True
        """
        if mask is not None:
            mask = expand_mask(mask, estimate.value.shape[: self.batch_dims])
        return reduce_estimate(estimate, self.reduction, self.batch_dims, mask)

    def route(self, q: Distribution, p: Distribution) -> str:
        """Return the name of the method for the pair, without drawing or evaluating a density.

        The result is "quadrature, else monte_carlo" if only the computation can decide.

        Raises:
            NotImplementedError: if no method would take the pair.
            TypeError, ValueError: as `forward`.
        """
        check_pair(q, p)
        route = as_method(self.method).route(q, p)
        if route is None:
            raise NotImplementedError(
                f"{self.method!r} has no route for KL({type_name(q)}‖{type_name(p)}); use AutoKL(), which has one for "
                "every q that can be sampled."
            )
        return route

    def add_observer(self, observer: Observer, called: nn.Module | None = None) -> None:
        """Tell an observer of every KL that this loss computes from now on, in an `ELBOLoss` as well.

        A call is told after its forward hooks were run, with what they and a subclass's `forward` made of the value; an
        `estimate` is told reduced. What an observer computes with the loss is told to nobody. Copies and pickles of the
        loss have no observers.

        Args:
            observer: the observer.
            called: the module that is called in place of the loss, where `torch.compile` or FSDP wraps it.
        """
        if not self.observers:
            called = self if called is None else called
            before, after = map(torch.compiler.disable, (self._before_call, self._after_call))
            self._observer_hooks = before, after
            self._handles = (
                called.register_forward_pre_hook(before, with_kwargs=True),
                called.register_forward_hook(after, with_kwargs=True, always_call=True),
            )
        self.observers.append(observer)

    def remove_observer(self, observer: Observer) -> None:
        """Tell the observer no more; one that was not added is ignored."""
        self.observers = [other for other in self.observers if other is not observer]
        if not self.observers:
            for handle in self._handles:
                handle.remove()
            self._observer_hooks, self._handles, self._random_states = (), (), []

    def tell(
        self, q: Distribution, p: Distribution, batch: Batch, value: Tensor, reduction: str, random_state: RngState
    ) -> None:
        """Tell the observers of one KL; the arguments are the attributes of a `Call`."""
        call, observers = Call(self, q, p, batch, value.detach(), reduction, random_state), self.observers
        with self.unobserved():
            for observer in observers:
                observer.observe(call)

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Tell no observer of the calls in the block."""
        observers, self.observers = self.observers, []
        try:
            yield
        finally:
            self.observers = observers

    def _before_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.observers:
            q, _, _, generator = _arguments(*args, **kwargs)
            self._random_states.append(rng_state(device_of(q), generator))

    def _after_call(self, module: nn.Module, args: Any, kwargs: Any, value: Tensor | None) -> None:
        if self.observers:
            random_state = self._random_states.pop()
            if value is not None:  # else the call has raised
                self._tell_reduced(*_arguments(*args, **kwargs)[:3], value, random_state)

    def _is_observed(self) -> bool:
        """Return whether there are observers that no hook is going to tell; a checkpoint's repetition is not told."""
        return bool(self.observers) and not self._random_states and not is_in_backward()

    def _observed(self, compute: Callable[..., Any], q: Any, p: Any, mask: Any, generator: Any) -> Any:
        """Compute a value or an estimate that no hook sees, and tell the observers."""
        random_state = rng_state(device_of(q), generator)
        with self.unobserved():
            found = compute(q, p, mask, generator)
        value = self.reduce(found).value if isinstance(found, KLEstimate) else found
        self._tell_reduced(q, p, mask, value, random_state)
        return found

    def _tell_reduced(self, q: Any, p: Any, mask: Tensor | None, value: Tensor, random_state: RngState) -> None:
        q, p, mask = self.drop_masked(q, p, mask)
        examples = check_pair(q, p)[: self.batch_dims]
        self.tell(q, p, Batch(examples, len(examples), mask), value, self.reduction, random_state)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles get: all but the observers, and the hooks that tell them."""
        state = vars(self) | {"observers": [], "_observer_hooks": (), "_handles": (), "_random_states": []}
        for name in ("_forward_pre_hooks", "_forward_hooks") if self._observer_hooks else ():
            state[name] = OrderedDict((k, hook) for k, hook in state[name].items() if hook not in self._observer_hooks)
        return state

    def __repr__(self) -> str:
        settings = {**self._settings(), "reduction": self.reduction, "batch_dims": self.batch_dims}
        return call_of(type(self), settings)

    def _settings(self) -> dict[str, object]:
        """Return the settings of the constructor beside the reduction, by name."""
        return {"method": self.method}


def _no_gradient(q: Distribution, p: Distribution) -> Tensor:
    """Return zero, connected to the parameters of q and p with zero gradient, even where they are NaN."""
    zero = torch.zeros((), dtype=dtype_of(in_full_precision(q)), device=device_of(q))
    for t in (*tensors_of(q), *tensors_of(p), *hidden_parameters(q), *hidden_parameters(p)):
        if t.requires_grad:
            zero = zero + torch.where(torch.zeros_like(t, dtype=torch.bool), t, 0.0).sum()
    return zero


def _arguments(
    q: Distribution, p: Distribution, mask: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Distribution, Distribution, Tensor | None, torch.Generator | None]:
    """Bind the arguments of a call, by position or by name, as `KLLoss.forward` does."""
    return q, p, mask, generator
