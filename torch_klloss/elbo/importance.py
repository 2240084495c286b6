"""The importance-weighted bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from torch_klloss.distributions.batch_dims import expand_to
from torch_klloss.distributions.checks import check_pair, type_name
from torch_klloss.distributions.densities import log_density, log_density_within
from torch_klloss.distributions.located import Located
from torch_klloss.distributions.precision import pair_in_full_precision
from torch_klloss.distributions.reach import check_dropped, has_path, log_density_with_fixed_parameters
from torch_klloss.distributions.stated_supports import is_discrete
from torch_klloss.distributions.supports import check_log_prob, contained, has_moving_support
from torch_klloss.distributions.tensors import device_of, unvalidated
from torch_klloss.elbo.batches import batch_of
from torch_klloss.elbo.likelihoods import negative_log_prob
from torch_klloss.numerics.arguments import check_generator, check_integer, check_tensors
from torch_klloss.numerics.dimensions import sum_after
from torch_klloss.numerics.once import constant_in, differentiable_once
from torch_klloss.numerics.tracing import is_forward_mode
from torch_klloss.reduction import Batch, ReductionName, check_reduction
from torch_klloss.rng import draw_seed, private_rng
from torch_klloss.samplers import IID
from torch_klloss.samplers.origins import prepare_located

IWAEGradient = Literal["doubly_reparameterized", "pathwise", "none"]

_ONCE = (
    "IWAELoss(gradient='doubly_reparameterized') has a gradient to q that cannot be differentiated again, and none in "
    "forward mode; use gradient='pathwise'."
)


class IWAELoss(nn.Module):
    """Compute the negative importance-weighted bound, -E[log 1/K Σ_k p(x|z_k) p(z_k)/q(z_k|x)], in nats per example.

    The bound rises with K towards log p(x), with a gap that vanishes as 1/K; K = 1 is the ELBO with a sampled KL. The
    value is an unbiased estimate of the bound of K samples, and the gradient one of its gradient, to the decoder's and
    the prior's parameters and to q's:

    - "doubly_reparameterized": to q's parameters Σ w̃_k² ∂log w_k/∂z_k ∂z_k/∂φ with the normalised weights w̃; its
      signal-to-noise ratio does not vanish with K. It cannot be differentiated again by what q depends on.
    - "pathwise": through the bound itself; to q's parameters its signal-to-noise ratio falls as 1/√K.
    - "none": no gradient to q; for a q that has no `rsample`, and for evaluation.

    Args:
        num_samples: K, at least 1.
        gradient: how the gradient to q's parameters is estimated.
        reduction: "mean", "sum" or "none" over the examples.
        batch_dims: how many leading dimensions index examples.

    Raises:
        ValueError: if a setting is out of its range.

    References:
        *Importance weighted autoencoders* (Burda, Grosse and Salakhutdinov, 2016). *Doubly reparameterized gradient
        estimators for Monte Carlo objectives* (Tucker et al., 2019). *Tighter variational bounds are not necessarily
        better* (Rainforth et al., 2018), for the ratios.

    Examples:
        >>> import torch
        >>> from torch.distributions import Independent, Normal
        >>> from torch_klloss import diagonal_normal, standard_normal_like
        >>> from torch_klloss.elbo import IWAELoss
        >>> x = torch.ones(16, 2)
        >>> q = diagonal_normal(x / 2, torch.full((16, 2), 0.5).log())  # the exact posterior: every weight is p(x)
        >>> bound = -IWAELoss(num_samples=8)(lambda z: Independent(Normal(z, 1.0), 1), x, q, standard_normal_like(q))
        >>> evidence = Normal(torch.zeros(2), 2**0.5).log_prob(x[0]).sum()
        >>> torch.allclose(bound, evidence)
        True
    """

    def __init__(
        self,
        num_samples: int = 64,
        *,
        gradient: IWAEGradient = "doubly_reparameterized",
        reduction: ReductionName = "mean",
        batch_dims: int = 1,
    ) -> None:
        super().__init__()
        check_reduction(reduction, batch_dims)
        check_integer("num_samples", num_samples)
        if gradient not in get_args(IWAEGradient):
            options = ", ".join(map(repr, get_args(IWAEGradient)))
            raise ValueError(f"gradient must be one of {options}, got {gradient!r}.")
        self.num_samples, self.gradient = num_samples, gradient
        self.reduction, self.batch_dims = reduction, batch_dims

    def forward(
        self,
        likelihood: Callable[[Tensor], Distribution],
        x: Tensor,
        q: Distribution,
        p: Distribution,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the negative bound.

        Args:
            likelihood: the decoder: turns z `[num_samples, *batch, *event]` into p(x|z) `[num_samples, *examples, …]`.
            x: the data, `[*examples, …]`.
            q: the posterior, `[*examples, …]`.
            p: the prior.
            mask: as in `ELBOLoss`, of the examples.
            generator: where the samples come from; the global stream by default.

        Returns:
            A scalar, or `[*examples]` with reduction="none".

        Raises:
            NotImplementedError: if q cannot be sampled in the way that `gradient` needs.
            ValueError: if shapes do not fit, or x lies outside the likelihood's support.
        """
        check_tensors(x=x)
        check_generator(generator)
        batch_shape = check_pair(q, p)
        batch = batch_of(batch_shape, self.batch_dims, mask)
        if batch.has_parts:
            raise ValueError(
                f"IWAELoss takes a mask of the examples {tuple(batch_shape[: self.batch_dims])}, not of parts."
            )
        q, p = pair_in_full_precision(batch.replace(q, batch_shape), batch.replace(p, batch_shape))
        gradient = self._gradient_for(q)
        q = unvalidated(expand_to(q, batch_shape))
        with nullcontext() if generator is None else private_rng(draw_seed(generator, device_of(q)), device_of(q)):
            draws = prepare_located(IID(), q, self.num_samples, differentiable=gradient != "none")
        points, x_q = draws.part(0, self.num_samples)
        if gradient == "doubly_reparameterized":  # without an origin, which would lead the gradient past the hooks
            x_q = x_q.map(lambda t: t.view_as(t))
        z = x_q.x
        log_q = self._log_q(q, x_q, points.log_q, gradient)
        log_ratio = log_density(p, x_q, contained(q, p)) - log_q
        log_likelihood = -self._negative_log_prob(likelihood(z), x, batch)
        kept_dims = 1 + len(batch.elements)
        log_weight = sum_after(log_likelihood, kept_dims) + sum_after(log_ratio, kept_dims)
        if gradient == "doubly_reparameterized" and z.requires_grad:
            log_weight = _with_squared_weights(x_q, log_weight)
        bound = log_weight.logsumexp(0) - math.log(self.num_samples)
        if batch.weights is not None:
            check_dropped(bound, batch.weights != 0, q, p)
        return batch.reduce(-bound, self.reduction)

    if TYPE_CHECKING:  # torch's has no types

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...  # noqa: D102

    def _log_q(self, q: Distribution, z: Located, given: Tensor | None, gradient: str) -> Tensor:
        """Return log q(z), given with z or not, with a gradient to q's parameters if `gradient` is "pathwise"."""
        shape = z.x.shape[:1] + q.batch_shape
        if gradient == "none":
            return log_density_within(q, z, shape).detach()
        if gradient == "pathwise":
            log_q = log_density_within(q, z, shape) if given is None else given
        else:
            log_q = log_density_with_fixed_parameters(q, z, shape)
        check_log_prob(q, log_q, shape)
        if not has_path(q, z.x, log_q):
            raise NotImplementedError(
                f"IWAELoss(gradient={self.gradient!r}) needs draws of q.rsample that carry a gradient to every "
                f"parameter, which those of {type_name(q)} do not; use gradient='none', or torch.no_grad() to evaluate."
            )
        return log_q

    def _negative_log_prob(self, p_x: Distribution, x: Tensor, batch: Batch) -> Tensor:
        shape = (self.num_samples, *x.shape)
        if not isinstance(p_x, Distribution):
            raise TypeError(f"likelihood(z) must return a torch.distributions.Distribution, got {type(p_x).__name__}.")
        if p_x.batch_shape + p_x.event_shape != shape:
            raise ValueError(
                f"likelihood(z) must be a distribution over {shape}, the samples followed by the shape of x, got batch "
                f"{tuple(p_x.batch_shape)} and event {tuple(p_x.event_shape)}."
            )
        p_x = batch.replace(p_x, p_x.batch_shape, (self.num_samples,))
        return negative_log_prob(p_x, batch.take(x).expand(shape))

    def _gradient_for(self, q: Distribution) -> str:
        """Return how q is differentiated, or raise an error if `gradient` would be wrong for it."""
        if self.gradient == "none" or not torch.is_grad_enabled():
            return "none"
        if not q.has_rsample or is_discrete(q):
            raise NotImplementedError(
                f"IWAELoss(gradient={self.gradient!r}) needs q.rsample, which {type_name(q)} lacks; use "
                "gradient='none', or torch.no_grad() to evaluate."
            )
        if self.gradient == "doubly_reparameterized" and has_moving_support(q):
            raise NotImplementedError(
                f"IWAELoss(gradient='doubly_reparameterized') would be biased for {type_name(q)}, whose support moves "
                "with its parameters; use gradient='pathwise'."
            )
        if self.gradient == "doubly_reparameterized" and is_forward_mode():
            raise NotImplementedError(_ONCE)
        return self.gradient

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        return f"num_samples={self.num_samples}, gradient={self.gradient!r}, reduction={self.reduction!r}"


def _with_squared_weights(z: Located, log_weight: Tensor) -> Tensor:
    """Return log w, and multiply the gradient to the draws, which contains the weights w̃, by w̃ once more."""
    weights = log_weight.detach().softmax(0)
    weights = weights.reshape(weights.shape + (1,) * (z.x.dim() - weights.dim()))
    for t in (z.x, z.log_below, z.log_above):
        if t is not None and t.requires_grad:
            t.register_hook(lambda grad: constant_in(weights.to(grad.dtype) * grad, grad, _ONCE))
    return differentiable_once(log_weight, z.x, _ONCE)
