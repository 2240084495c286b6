"""Estimates of the KL from log-probabilities at samples."""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torch_klloss.methods.monte_carlo.gradients import by_score, null_ratio
from torch_klloss.methods.monte_carlo.tail_diagnostics import may_have_heavy_tail
from torch_klloss.numerics.arguments import check_dim, check_number, check_tensors, check_word
from torch_klloss.numerics.devices import can_be_read
from torch_klloss.numerics.exponentials import expm1
from torch_klloss.reduction import expand_mask

__all__ = [
    "Level",
    "LogProbGradient",
    "LogProbValue",
    "kl_from_log_probs",
]


def __dir__() -> list[str]:
    return sorted(__all__)


LogProbGradient = Literal["pathwise", "score_function", "k2", "none"]
LogProbValue = Literal["k1", "k2", "k3"]
Level = Literal["sequence", "token"]


def kl_from_log_probs(
    log_q: Tensor,
    log_p: Tensor,
    dim: int = 0,
    gradient: LogProbGradient | None = None,
    *,
    value: LogProbValue = "k1",
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    log_behavior: Tensor | None = None,
    token_dim: int | None = None,
    level: Level | None = None,
) -> Tensor:
    """Estimate KL(q‖p) from log q(x) and log p(x) at samples x drawn from q, in nats.

    The question that this library began with computed, at samples from q,

        kl_1 = (log_qx.exp() * (log_qx - log_px)).mean()      # wrong: weighted by q twice

    Drawing from q *is* the weighting by q. What it should have been:

        kl_1 = (log_qx - log_px).mean()                       # kl_from_log_probs(log_qx, log_px)

    **The value**, with ℓ = log q - log p and r = p/q: "k1", the mean of ℓ, is unbiased with variance Var_q[ℓ] / S; a
    single one may be negative. "k3", the mean of r - 1 + ℓ, is unbiased and never negative, but has an infinite
    variance where q's tails are lighter than p's; a `HeavyTailWarning` is given when the ratios at hand look like
    it. "k2", the mean of ℓ²/2, is biased.

    **The gradient** is chosen separately, because none of the three values is always safe as a loss: at detached
    samples k1 has an expected gradient of zero and k3 the gradient of KL(p‖q); along a path k2 has the gradient of
    E_q[ℓ²]/2. The options below have the gradient of KL(q‖p) in expectation, whatever the value. Which one is right
    depends on how the samples were made, which log-probabilities do not show. So choose if `log_q` requires a gradient:

    - "pathwise": x came from `rsample`, and `log_q`, `log_p` are functions of it.
    - "score_function": x came from `sample`, so it has no gradient. The estimate is ℓ ∇ log q, and from two samples on
      ℓ is taken less its mean over the other samples; these must be independent.
    - "k2": the same without that baseline, which is the gradient of ℓ²/2 to q; noisier, but right for samples that
      depend on one another.
    - "none": the value alone, for logging.

    If `log_q` requires no gradient (a fixed q), `log_p` gets the gradient of -E_q[log p], as with every choice but
    "none".

    **Sequences.** With `token_dim`, log q and log p belong to tokens, given the tokens before them, and `level` says
    what is estimated. "sequence" adds the tokens up first: x is the whole sequence, and the result estimates the KL of
    its distribution, in value and gradient. "token" adds up one estimate per token. The value is the same in
    expectation (with k3 its variance is lower). The gradient, Σ_t ℓ_t ∇ log q_t, is the gradient of every token's KL
    *with the prefixes held fixed*. The gradient of the KL of the sequences also has the effect of a token on the
    prefixes of later tokens, Σ_t (Σ_{u>t} ℓ_u) ∇ log q_t.

    The log-probabilities of all classes are no samples: a warning says so where exp of both adds up to 1 along a
    dimension. Take `AutoKL()(categorical(q_logits), categorical(p_logits))` for them.

    Args:
        log_q: log q at the samples, summed over the event: one number a draw. `[..., S, ...]`, with S at `dim`; with
            `token_dim` one number a token.
        log_p: log p at the same samples, of the same shape.
        dim: the dimension that counts the samples.
        gradient: the gradient of the result.
        value: the value of the result.
        mask: bool or weights, broadcasting to `log_q`. Elements of weight zero add nothing, even if inf or NaN, neither
            to the result nor to a baseline. The mask must not depend on x, except for where a sequence ended.
        normalizer: the divisor of the sum; by default the number of samples, or the sum of the mask over them.
            It is the number of tokens only if you pass that.
        log_behavior: log b(x), if the samples were drawn from b instead of q. They are weighted by q(x)/b(x), which
            carries no gradient; this is unbiased where b covers q, and has heavy tails where q is wider. With
            level="token" a token is weighted by the ratio q/b of the tokens up to and including it.
        token_dim: the dimension that counts the tokens, other than `dim`.
        level: "sequence" or "token"; required with `token_dim`.

    Returns:
        The estimate, with `dim` and `token_dim` removed. Half-precision inputs are converted to float32.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if shapes differ or do not fit, there are no samples, or an option is unknown, is missing where it
            is needed, or would not have the gradient of the KL.

    References:
        *Approximating KL divergence* (Schulman, 2020). *On a few pitfalls in KL divergence gradient estimation for RL*
        (Tang and Munos, 2025). *Buy 4 REINFORCE samples, get a baseline for free!* (Kool, van Hoof and Welling, 2019).

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from torch_klloss import kl_from_log_probs
        >>> q, p = Normal(1.0, 1.0), Normal(0.0, 1.0)
        >>> x = q.icdf((torch.arange(1000) + 0.5) / 1000)
        >>> kl_from_log_probs(q.log_prob(x), p.log_prob(x))
        tensor(0.5000)
        >>> (q.log_prob(x).exp() * (q.log_prob(x) - p.log_prob(x))).mean()  # the wrong line
        tensor(0.1410)
        >>> log_q, log_p = torch.zeros(2, 3), torch.tensor([[-1.0, -2.0, 9.0], [-1.0, 9.0, 9.0]])
        >>> written = torch.tensor([[True, True, False], [True, False, False]])  # a sequence of two tokens, and of one
        >>> kl_from_log_probs(log_q, log_p, mask=written, token_dim=1, level="sequence")
        tensor(2.)
    """
    _check_tensors(log_q, log_p, dim, mask, log_behavior, normalizer)
    _check_options(log_q, gradient, value, log_behavior)
    _check_level(log_q, dim, mask, token_dim, level)
    _warn_of_classes(log_q, log_p, dim, mask)
    samples = _Samples.of(log_q, log_p, dim, mask, log_behavior, token_dim, level)
    samples.warn_of_tails(value, weighted=log_behavior is not None)
    terms = samples.value_terms(value).detach() + samples.gradient_terms(gradient)
    terms = torch.where(samples.kept, terms, 0.0)
    total = ((terms.sum(-1) if level == "token" else terms) * samples.weights).sum(0)
    return total / (_count(samples.weights) if normalizer is None else normalizer)


class _Samples(NamedTuple):
    """The samples along the first dimension; with level="token" the tokens along the last.

    Attributes:
        log_q: log q, 0 where masked.
        log_p: log p, 0 where masked.
        log_weight: log q - log b without a gradient, or 0.
        kept: whether a sample or token has a weight other than zero.
        weights: the weights of the samples.
    """

    log_q: Tensor
    log_p: Tensor
    log_weight: Tensor
    kept: Tensor
    weights: Tensor

    @classmethod
    def of(
        cls,
        log_q: Tensor,
        log_p: Tensor,
        dim: int,
        mask: Tensor | None,
        log_behavior: Tensor | None,
        token_dim: int | None,
        level: str | None,
    ) -> _Samples:
        """Return the arguments of `kl_from_log_probs` in one layout, masked and in at least float32."""
        log_q, log_p = (t.float() if t.element_size() < 4 else t for t in (log_q, log_p))
        weights = torch.ones_like(log_q) if mask is None else mask.to(log_q).expand_as(log_q)
        log_b = log_q if log_behavior is None else log_behavior
        kept = weights != 0
        log_q, log_p, log_b = (torch.where(kept, t, 0.0) for t in (log_q, log_p, log_b))
        log_weight = torch.zeros_like(log_q) if log_behavior is None else (log_q - log_b).detach()
        ends = (dim, 0) if token_dim is None else ((dim, token_dim), (0, -1))
        log_q, log_p, log_weight, kept, weights = (t.movedim(*ends) for t in (log_q, log_p, log_weight, kept, weights))
        if level == "sequence":
            log_q, log_p, log_weight, kept = log_q.sum(-1), log_p.sum(-1), log_weight.sum(-1), kept.any(-1)
        elif level == "token":
            log_weight = log_weight.cumsum(-1)
        return cls(log_q, log_p, log_weight, kept, weights if token_dim is None else weights.amax(-1))

    def value_terms(self, value: str) -> Tensor:
        """Return the terms whose average is the value."""
        log_ratio = self.log_q - self.log_p
        if value == "k2":
            log_ratio = log_ratio**2 / 2
        elif value == "k3":
            log_ratio = expm1(-log_ratio) + log_ratio
        return log_ratio * self.log_weight.exp()

    def gradient_terms(self, gradient: str | None) -> Tensor:
        """Return terms whose value is zero, and whose derivatives have the mean of those asked for."""
        if gradient == "none":
            return torch.zeros_like(self.log_q)
        if gradient in (None, "pathwise"):
            return self.log_weight.exp() * (_zero(self.log_q) - _zero(self.log_p))
        score = null_ratio(self.log_q)
        log_ratio = score.log1p() - _zero(self.log_p)
        terms = by_score(log_ratio, self.log_q, self._advantage(baseline=gradient == "score_function"))
        return self.log_weight.exp() * (terms - score)

    def _advantage(self, baseline: bool) -> Tensor:
        """Return log q - log p, less its mean over the other samples if `baseline`."""
        log_ratio = (self.log_q - self.log_p).detach()
        if baseline:
            weighted = log_ratio * self.log_weight.exp()
            num_others = self.kept.sum(0) - self.kept.to(log_ratio)
            others = (weighted.sum(0) - weighted) / num_others.clamp_min(1)
            log_ratio = log_ratio - torch.where(num_others > 0, others, 0.0)
        return torch.where(log_ratio.isfinite(), log_ratio, 0.0)

    def warn_of_tails(self, value: str, weighted: bool) -> None:
        """Warn where a weight or ratio has a heavy tail."""
        if weighted:
            exponent = torch.where(self.kept, self.log_weight, -torch.inf)
            remedy = "Draw the samples from q, or from something closer to q."
            may_have_heavy_tail(exponent, "kl_from_log_probs(log_behavior=...)", remedy)
        if value == "k3":
            exponent = torch.where(self.kept, self.log_p - self.log_q + self.log_weight, -torch.inf)
            may_have_heavy_tail(exponent, "kl_from_log_probs(value='k3')", "Use value='k1'.")


def _zero(t: Tensor) -> Tensor:
    """Return zeros with the gradient of t."""
    finite = torch.where(t.isfinite(), t, 0.0)
    return finite - finite.detach()


def _count(weights: Tensor) -> Tensor:
    total = weights.sum(0)
    if can_be_read(total) and bool((total == 0).any()):
        raise ValueError(
            "the mask must leave at least one sample along dim, got one that leaves none; pass normalizer."
        )
    return total


def _warn_of_classes(log_q: Tensor, log_p: Tensor, dim: int, mask: Tensor | None) -> None:
    """Warn where exp(log q) and exp(log p) add up to 1 along a dimension: these are no samples, but all classes.

    None is given where the mean over the classes is what was meant: for classes along `dim` that q makes equally
    likely, or that a mask of weights weighs.
    """
    if not can_be_read(log_q) or log_q.numel() == 0 or (mask is not None and mask.dtype is not torch.bool):
        return
    log_q, log_p = log_q.detach(), log_p.detach()
    for d, num_classes in enumerate(log_q.shape):
        kept = torch.ones((), dtype=torch.bool, device=log_q.device) if mask is None else mask.expand_as(log_q).any(d)
        first = tuple(slice(None) if k == d else 0 for k in range(log_q.dim()))
        if num_classes < 2 or (mask is None and not bool(_add_up(log_q[first], 0))):
            continue
        if not all(bool((_add_up(log, d) | ~kept).all()) for log in (log_q, log_p)):
            continue
        is_enumerated = d == dim % log_q.dim() and bool(torch.isclose(log_q.amax(d), log_q.amin(d)).all())
        if _chance_of_classes(log_q.movedim(d, -1), kept) < _CHANCE and not is_enumerated:
            warnings.warn(
                f"log_q and log_p look like the log-probabilities of all {num_classes} classes: exp of both adds up to "
                f"1 along dimension {d} of {tuple(log_q.shape)}. kl_from_log_probs takes log-probabilities at samples. "
                "For classes take AutoKL()(categorical(q_logits), categorical(p_logits)), whose logits these may be.",
                stacklevel=3,
            )
            return


def _chance_of_classes(log_q: Tensor, kept: Tensor) -> float:
    """Return the probability K! Π q_k that K samples meet each of K classes once, in all lines of the last dim."""
    num_classes = log_q.shape[-1]
    each = log_q.sum(-1, dtype=torch.float64) + math.lgamma(num_classes + 1)
    return torch.where(kept, each, 0.0).sum().exp().item()


def _add_up(log: Tensor, dim: int) -> Tensor:
    """Return where exp(log) adds up to 1, up to the rounding of its dtype: at most that of an entropy."""
    eps = torch.finfo(log.dtype).eps
    total = log.exp().sum(dim, dtype=torch.promote_types(log.dtype, torch.float32))
    return (total - 1).abs() <= 4 * eps * (1 + math.log(log.shape[dim]))


_CHANCE = 1e-4  # of a false alarm


def _check_tensors(
    log_q: Tensor,
    log_p: Tensor,
    dim: int,
    mask: Tensor | None,
    log_behavior: Tensor | None,
    normalizer: Tensor | float | None,
) -> None:
    check_tensors(log_q=log_q, log_p=log_p)
    if log_behavior is not None:
        check_tensors(log_behavior=log_behavior)
    if mask is not None:
        expand_mask(mask, log_q.shape, "of log_q")
    if normalizer is not None and not isinstance(normalizer, Tensor):
        check_number("normalizer", normalizer)
    if not (log_q.is_floating_point() and log_p.is_floating_point()):
        raise TypeError(f"log_q and log_p must be of floating point, got {log_q.dtype} and {log_p.dtype}.")
    if log_q.shape != log_p.shape:
        raise ValueError(
            f"log_q and log_p must have the same shape, got {tuple(log_q.shape)} and {tuple(log_p.shape)}: sum both "
            "over the event's dimensions (Independent does), or expand one of them on purpose."
        )
    if log_behavior is not None and log_behavior.shape != log_q.shape:
        raise ValueError(
            f"log_behavior must have the shape of log_q, got {tuple(log_behavior.shape)} and {tuple(log_q.shape)}."
        )
    if log_q.dim() > 0:
        check_dim("dim", dim, log_q, "log_q")
    if log_q.dim() == 0 or log_q.shape[dim] == 0:
        raise ValueError(f"log_q must hold at least one sample along dim={dim}, got shape {tuple(log_q.shape)}.")


def _check_options(log_q: Tensor, gradient: str | None, value: str, log_behavior: Tensor | None) -> None:
    check_word("value", value, LogProbValue)
    if isinstance(gradient, str) and gradient in _WRONG:
        raise ValueError(
            f"gradient={gradient!r} is refused: differentiated at samples without a gradient, {_WRONG[gradient]}. "
            "Take gradient='score_function' (or 'k2'), the gradient of KL(q‖p)."
        )
    if gradient is not None:
        check_word("gradient", gradient, LogProbGradient)
    if gradient == "pathwise" and log_behavior is not None:
        raise ValueError(
            "gradient='pathwise' needs samples of q itself, but log_behavior says that they came from another "
            "distribution, so no path leads from q's parameters to them. Take gradient='score_function'."
        )
    if gradient is None and log_q.requires_grad:
        raise ValueError(
            "log_q requires a gradient, and its values do not show how the samples were made: pass "
            "gradient='pathwise' (the samples came from q.rsample), gradient='score_function' (they came from "
            "q.sample, without a gradient of their own), or gradient='none' (the value alone). The plain mean over "
            "samples without a gradient would be a loss whose expected gradient is zero."
        )


_WRONG = {
    "k1": "the mean of log q - log p has an expected gradient of zero",
    "k3": "r - 1 - log r has the gradient of KL(p‖q), the other direction",
}


def _check_level(log_q: Tensor, dim: int, mask: Tensor | None, token_dim: int | None, level: str | None) -> None:
    if (token_dim is None) != (level is None):
        raise ValueError(
            f"token_dim and level must be given together, got token_dim={token_dim!r} and level={level!r}: "
            "level='sequence' has the gradient of the KL of the sequences, level='token' the gradient of every token's "
            "KL with its prefix held fixed."
        )
    if level is None or token_dim is None:
        return
    check_word("level", level, Level)
    check_dim("token_dim", token_dim, log_q, "log_q")
    if token_dim % log_q.dim() == dim % log_q.dim():
        raise ValueError(f"token_dim must differ from dim, got {token_dim} and {dim}.")
    if mask is not None and mask.dtype is not torch.bool:
        raise ValueError(f"with token_dim the mask says which tokens were written, and must be bool, got {mask.dtype}.")
