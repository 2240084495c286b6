"""The drop-in loss of a VAE."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from torch_klloss.distributions.checks import check_pair
from torch_klloss.distributions.families import diagonal_normal, standard_normal_like
from torch_klloss.distributions.reach import check_dropped
from torch_klloss.elbo.arguments import Latents, check_moments, pairs_of, same_shape, sum_levels
from torch_klloss.elbo.batches import batch_of
from torch_klloss.elbo.control import BetaController
from torch_klloss.elbo.divergence import Divergence, call_hooks, divergence, is_hooked, moments_of
from torch_klloss.elbo.fused import can_fuse, plain_elbo
from torch_klloss.elbo.likelihoods import (
    LikelihoodName,
    check_likelihood,
    check_shape,
    check_support,
    check_values,
    full_precision,
    logits_of,
    negative_log_prob,
    tensor_nll,
)
from torch_klloss.elbo.terms import ELBOTerms
from torch_klloss.elbo.weighting import FreeNats, FreeNatsPer, balanced
from torch_klloss.losses import AutoKL, KLLoss
from torch_klloss.numerics.arguments import call_of, check_number, check_tensors
from torch_klloss.numerics.tracing import without_autocast
from torch_klloss.reduction import Batch
from torch_klloss.rng import rng_state
from torch_klloss.schedules import Schedule


class ELBOLoss(nn.Module):
    """Compute a VAE's loss: reconstruction + β · KL, the negative ELBO in nats per example.

    The reconstruction is -log p(x|z), summed over all dimensions of x; the KL is summed over the latent dimensions;
    both are means over the examples, and there is no other factor. With β = 1 and no free nats, capacity or balance,
    the loss is an upper bound of -log p(x), unbiased in value and gradient wherever the KL is.

    Half-precision tensors are computed with in float32, with autocast off. Values are checked (x within the
    likelihood's support, a log-variance within ±80) as long as torch's own validation is on.

    Args:
        kl: computes the KL. Its `reduction` and `batch_dims` hold for all terms; a copy of it is the submodule `kl`.
        beta: the weight of the KL, at least 0: a number, a Schedule, which needs `step`, or a controller
            (`GECO`, `PIControl`). The attribute `beta` is the current number, and may be set.
        free_nats: nats that cost nothing; see `FreeNats`.
        free_nats_per: "example", "dimension" or "group".
        free_nats_groups: into how many groups of equal size the dimensions of each level are divided; with None, each
            (q, p) pair is a group.
        capacity: C ≥ 0, a number or a Schedule: β · |KL - C| replaces β · KL. β is then the paper's γ, and is large.
        balance: the learned prior's share of the KL's gradient, in [0, 1]; the posterior gets the rest. DreamerV2 has
            0.8. With None both get the whole gradient.

    Raises:
        TypeError: if `kl` is not a KLLoss.
        ValueError: if a setting is out of its range, or two exclude one another.

    References:
        *Auto-encoding variational Bayes* (Kingma and Welling, 2014). *beta-VAE: learning basic visual concepts with a
        constrained variational framework* (Higgins et al., 2017), for β. *Improved variational inference with inverse
        autoregressive flow* (Kingma et al., 2016), for free nats. *Understanding disentangling in beta-VAE* (Burgess
        et al., 2018), for the capacity. *Mastering Atari with discrete world models* (Hafner et al., 2021), for
        balancing.

    Examples:
        >>> import torch
        >>> from torch.distributions import Bernoulli, Independent
        >>> from torch_klloss import ELBOLoss, diagonal_normal, standard_normal_like
        >>> x, logits = torch.ones(128, 64), torch.zeros(128, 64)  # an image, and the output of the decoder
        >>> q = diagonal_normal(torch.ones(128, 8), torch.zeros(128, 8))
        >>> terms = ELBOLoss(beta=2.0)(Independent(Bernoulli(logits=logits), 1), x, q, standard_normal_like(q))
        >>> terms.reconstruction, terms.kl, terms.loss  # 64 log 2, 4, and their weighted sum
        (tensor(44.3614), tensor(4.), tensor(52.3614))
        >>> ELBOLoss().from_tensors(logits, x, q.mean, 0 * q.mean, likelihood="bernoulli_logits").loss
        tensor(48.3614)
    """

    def __init__(
        self,
        kl: KLLoss | None = None,
        *,
        beta: float | Schedule | BetaController = 1.0,
        free_nats: float = 0.0,
        free_nats_per: FreeNatsPer = "example",
        free_nats_groups: int | None = None,
        capacity: float | Schedule | None = None,
        balance: float | None = None,
    ) -> None:
        super().__init__()
        kl = AutoKL() if kl is None else kl
        if not isinstance(kl, KLLoss):
            raise TypeError(f"kl must be a KLLoss, such as AutoKL() or KLLoss(method), got {kl!r}.")
        self.reduction = kl.reduction
        self.kl = copy.deepcopy(kl)
        self.kl.reduction = "none"
        self.schedule = beta if isinstance(beta, Schedule) else None
        self.controller = beta if isinstance(beta, BetaController) else None
        self._beta = None if isinstance(beta, (Schedule, BetaController)) else _checked_weight("beta", beta)
        self.free_nats = FreeNats(free_nats, free_nats_per, free_nats_groups)
        self.capacity = (
            capacity if capacity is None or isinstance(capacity, Schedule) else _checked_weight("capacity", capacity)
        )
        if balance is not None:
            check_number("balance", balance)
        if balance is not None and not 0 <= balance <= 1:
            raise ValueError(f"balance must lie in [0, 1], the prior's share of the gradient, got {balance!r}.")
        self.balance = balance
        self._check_combination()

    @property
    def beta(self) -> float:
        """The weight of the KL in a call without `step`; set it to drive the weight from outside."""
        if self.controller is not None:
            return float(self.controller.beta)
        if self._beta is None and self.schedule is not None:
            return self.schedule(0)
        return float(self._beta or 0.0)

    @beta.setter
    def beta(self, value: float) -> None:
        if self.controller is not None:
            raise ValueError(f"beta is driven by {self.controller!r}: build ELBOLoss with a number to set it.")
        self._beta = _checked_weight("beta", value)

    def forward(
        self,
        p_x: Distribution,
        x: Tensor,
        q: Latents,
        p: Distribution | Sequence[Distribution] | None = None,
        step: float | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> ELBOTerms:
        """Return the loss and its terms.

        Args:
            p_x: the likelihood p(x|z) at a z that was drawn from q by `rsample`, `[*examples, …]`.
            x: the data, of p_x's batch and event shape.
            q: the posterior q(z|x), `[*examples, …]`; for a hierarchy a list of (q, p) pairs, or of posteriors.
            p: the prior p(z); a list if q is a list of posteriors; None if q is a list of pairs.
            step: the step at which a Schedule is evaluated.
            mask: bool or weights: `[*examples]`, or with more dimensions, as `[batch, time]`. Steps of weight zero are
                left out of the sums of their sequence. Elements of weight zero may be NaN.
            generator: the source of randomness of a sampled KL.
            lengths: in place of a mask `[batch, time]`, how many steps of each sequence count.

        For sequences `[batch, time, latent]`, q and p of batch shape `[batch, time]`, the default `batch_dims=1` gives
        nats a sequence (summed over its steps), and AutoKL(batch_dims=2) nats a step.

        Raises:
            TypeError: if an argument is of the wrong kind.
            ValueError: if shapes do not fit, x lies outside the support of p_x, a schedule has no step, the mask drops
                everything, or the KL does not split as free nats need it.
            NotImplementedError: if `kl` has no route for a pair.
        """
        check_tensors(x=x)
        if mask is None and lengths is None and isinstance(q, Distribution) and isinstance(p, Distribution):
            terms = self._plain_terms_of(p_x, x, q, p, step) if self._is_plain() else None
            if terms is not None:
                return terms
        pairs = pairs_of(q, p)
        with without_autocast(x.device):
            batch = batch_of(check_pair(*pairs[0]), self.kl.batch_dims, mask, lengths)
            check_shape(p_x, x, batch.elements)
            p_x, x = batch.replace(p_x, p_x.batch_shape), batch.take(x)
            # by index: if a hook breaks the graph, Dynamo loses an iterator over the pairs
            levels = [self._divergence(*pairs[level], batch, generator) for level in range(len(pairs))]
            nll = negative_log_prob(p_x, x)
            if batch.weights is not None:
                check_dropped(nll, batch.weights != 0, p_x)
            return self._terms(nll, levels, batch, step)

    if TYPE_CHECKING:  # torch's has no types

        def __call__(self, *args: Any, **kwargs: Any) -> ELBOTerms: ...  # noqa: D102

    def from_tensors(
        self,
        recon: Tensor,
        x: Tensor,
        mean: Tensor,
        logvar: Tensor,
        likelihood: LikelihoodName = "bernoulli",
        step: float | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> ELBOTerms:
        """Return the loss and its terms from the tensors of a VAE, with a standard Normal prior.

        Args:
            recon: the output of the decoder, `[*examples, …]`: probabilities for "bernoulli" (their logarithms
                clamped at -100, as in torch), logits for "bernoulli_logits", means for "gaussian".
            x: the data, of the same shape (or one of the two flat); in [0, 1] for the first two.
            mean: of the posterior, `[*examples, *latent]`.
            logvar: the logarithm of its **variance**.
            likelihood: "bernoulli", "bernoulli_logits", or "gaussian" with variance one, its constant included.
            step: as in `forward`.
            mask: as in `forward`.
            generator: as in `forward`.
            lengths: as in `forward`.

        Raises:
            TypeError, ValueError: as `forward`; and if recon and x, or mean and logvar, have different shapes.

        Examples:
            >>> import torch
            >>> from torch_klloss import ELBOLoss
            >>> recon, x = torch.full((2, 3), 0.5), torch.tensor([[0.0, 1.0, 0.3], [1.0, 0.0, 0.9]])
            >>> terms = ELBOLoss().from_tensors(recon, x, torch.zeros(2, 4), torch.zeros(2, 4))
            >>> terms.reconstruction, terms.kl_per_dimension  # 3 log 2
            (tensor(2.0794), tensor([0., 0., 0., 0.]))
        """
        check_likelihood(likelihood)
        check_tensors(recon=recon, x=x, mean=mean, logvar=logvar)
        if mask is None and lengths is None and self._is_plain():
            terms = self._plain_terms(recon, x, mean, logvar, likelihood, step)
            if terms is not None:
                return terms
        with without_autocast(x.device):
            check_moments(mean, logvar)
            (recon, x), (mean, logvar) = full_precision(recon, x), full_precision(mean, logvar)
            kl = self.kl
            given = {key: t for key, t in (("mask", mask), ("lengths", lengths)) if t is not None}
            check_tensors(**given)
            dims = [t.dim() + (key == "lengths") for key, t in given.items()]
            element_dims = max(kl.batch_dims, *dims, 0)
            batch = batch_of(mean.shape[:element_dims], kl.batch_dims, mask, lengths)
            recon, x = same_shape(recon, x, batch.elements)
            recon, x, mean, logvar = (batch.take(t) for t in (recon, x, mean, logvar))
            q = diagonal_normal(mean, logvar, element_dims)
            level = self._divergence(q, standard_normal_like(q), batch, generator)
            return self._terms(tensor_nll(recon, x, likelihood), [level], batch, step)

    def _is_plain(self) -> bool:
        """Return whether the loss is just reconstruction + β · KL, with a number for β."""
        if self.reduction != "mean" or self.free_nats.nats > 0:
            return False
        return self.controller is None and self.capacity is None and self.balance is None

    def _plain_terms(
        self, recon: Tensor, x: Tensor, mean: Tensor, logvar: Tensor, likelihood: LikelihoodName, step: float | None
    ) -> ELBOTerms | None:
        """Return the terms by the fused kernel; None where it does not apply."""
        kl = self.kl
        if not can_fuse(kl, recon, x, mean, logvar):
            return None
        recon, x = same_shape(recon, x, mean.shape[: kl.batch_dims])
        check_values(recon, x, likelihood)
        return self._fused(recon, x, mean, logvar, likelihood, step)

    def _plain_terms_of(
        self, p_x: Distribution, x: Tensor, q: Distribution, p: Distribution, step: float | None
    ) -> ELBOTerms | None:
        """Return the same from distributions: a Bernoulli of logits, `diagonal_normal` and its standard Normal."""
        kl, moments, logits = self.kl, moments_of(q, p), logits_of(p_x)
        if moments is None or logits is None or len(q.batch_shape) < kl.batch_dims:
            return None
        check_shape(p_x, x, q.batch_shape[: kl.batch_dims])
        if not can_fuse(kl, logits, x, *moments):
            return None
        check_support(p_x, x)
        return self._fused(logits, x, *moments, "bernoulli_logits", step)

    def _fused(
        self, recon: Tensor, x: Tensor, mean: Tensor, logvar: Tensor, likelihood: LikelihoodName, step: float | None
    ) -> ELBOTerms | None:
        kl = self.kl
        terms = plain_elbo(recon, x, mean, logvar, self._beta_at(step), likelihood, kl.batch_dims)
        if terms is not None and (kl.observers or is_hooked(kl)):
            batch = batch_of(mean.shape[: kl.batch_dims], kl.batch_dims)
            q = diagonal_normal(mean, logvar, kl.batch_dims)
            p = standard_normal_like(q)
            call_hooks(kl, q, p, batch)
            kl.tell(q, p, batch, terms.kl, self.reduction, rng_state(mean.device))
        return terms

    def _terms(self, nll: Tensor, levels: Sequence[Divergence], batch: Batch, step: float | None) -> ELBOTerms:
        """Return the terms, given -log p(x) of the elements and the KL of every level."""
        averages = tuple(
            None if level.per_dimension is None else batch.average(level.per_dimension) for level in levels
        )
        reconstruction = batch.total(nll, self.reduction)
        per_level = tuple(
            level.reduce(batch, self.reduction, average) for level, average in zip(levels, averages, strict=True)
        )
        kl = sum_levels(per_level)
        beta = self._weight(reconstruction, kl, step)
        penalty = self._penalty(per_level, averages, levels, batch, step)
        each = averages if len(levels) > 1 else averages[0]
        return ELBOTerms(reconstruction + beta * penalty, reconstruction, kl, each, beta, per_level)

    def _divergence(
        self, q: Distribution, p: Distribution, batch: Batch, generator: torch.Generator | None
    ) -> Divergence:
        if self.balance is not None:
            q, p = balanced(q, p, self.balance)
        must_split = self.free_nats.must_split
        return divergence(self.kl, q, p, batch, generator, reduction=self.reduction, must_split=must_split)

    def _penalty(
        self,
        kl_per_level: Sequence[Tensor],
        averages: Sequence[Tensor | None],
        levels: Sequence[Divergence],
        batch: Batch,
        step: float | None,
    ) -> Tensor:
        """Return the number that β weighs: the KL, or the KL changed by free nats or the capacity."""
        if self.capacity is not None:
            return (sum_levels(kl_per_level) - _at_step("capacity", self.capacity, step)).abs()
        if self.free_nats.nats == 0:
            return sum_levels(kl_per_level)
        if self.free_nats.uses_averages:
            return self.free_nats.floor_averages(kl_per_level, averages)
        per_example = sum_levels([batch.per_example(level.value) for level in levels])
        return batch.reduce(per_example.clamp(min=self.free_nats.nats), self.reduction)

    def _weight(self, reconstruction: Tensor, kl: Tensor, step: float | None) -> float | Tensor:
        if self.controller is not None:
            beta: Tensor = self.controller(reconstruction.detach(), kl.detach())
            return beta
        return self._beta_at(step)

    def _beta_at(self, step: float | None) -> float:
        if self.schedule is not None and (step is not None or self._beta is None):
            return _at_step("beta", self.schedule, step)
        return self.beta

    def _check_combination(self) -> None:
        if self.free_nats.nats > 0 and self.capacity is not None:
            raise ValueError("free_nats and capacity both say how large the KL may stay: give one of them.")
        averaging = {
            "capacity": self.capacity is not None,
            f"free_nats_per={self.free_nats.per!r}": self.free_nats.uses_averages,
            type(self.controller).__name__: self.controller is not None,
        }
        for option, is_set in averaging.items():
            if is_set and self.reduction != "mean":
                raise ValueError(
                    f"{option} takes the mean over the batch: kl must have reduction='mean', got {self.reduction!r}."
                )

    def __repr__(self) -> str:
        kl = copy.copy(self.kl)
        kl.reduction = self.reduction
        settings = {
            "kl": None if repr(kl) == "AutoKL()" else kl,
            "beta": self.controller or self.schedule or self.beta,
            "free_nats": self.free_nats.nats,
            "free_nats_per": self.free_nats.per,
            "free_nats_groups": self.free_nats.groups,
            "capacity": self.capacity,
            "balance": self.balance,
        }
        return call_of(type(self), settings)


def _at_step(which: str, value: float | Schedule, step: float | None) -> float:
    if not isinstance(value, Schedule):
        return value
    if step is None:
        instead = ", or let the KLAnnealing callback set ELBOLoss.beta" if which == "beta" else ""
        raise ValueError(f"{which} is a schedule, {value!r}: pass step=…{instead}.")
    return _checked_weight(which, value(step))


def _checked_weight(which: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{which} must be a number, or a Schedule or controller of ELBOLoss(...), got {value!r}.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{which} must be finite and at least 0, got {value!r}.")
    return float(value)
