"""The KL for people who hold nothing but log-probabilities at samples from q."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from torch_klloss.methods.monte_carlo import score_function_log_ratio

LogProbGradient = Literal["pathwise", "score_function", "none"]


def kl_from_log_probs(log_q: Tensor, log_p: Tensor, dim: int = 0, gradient: LogProbGradient | None = None) -> Tensor:
    """Estimate KL(q‖p) from log q(x) and log p(x) at samples x drawn from q, in nats.

    The question that this library began with computed, at samples from q,

        kl_1 = (log_qx.exp() * (log_qx - log_px)).mean()      # wrong: weighted by q twice

    Drawing from q *is* the weighting by q. What it should have been:

        kl_1 = (log_qx - log_px).mean()                       # kl_from_log_probs(log_qx, log_px)

    The value is unbiased with variance Var_q[log q - log p] / S; a single one may be negative. The gradient depends on
    how the samples were made, which their log-probabilities do not tell. So where `log_q` requires a gradient,
    say it:

    - "pathwise": x came from `rsample`, and `log_q`, `log_p` are functions of it. Unbiased.
    - "score_function": x came from `sample`, with no gradient of its own. Takes (log q - log p) ∇ log q, less the mean
      of the other samples from two on. Unbiased; the samples must be independent.
    - "none": the number alone, for logging.

    The mean of detached samples as a loss would have a gradient of expectation zero, which is why there is no
    default. Without a gradient in `log_q` (a fixed q), the gradient to `log_p` is that of -E_q[log p].

    Args:
        log_q: log q at the samples, summed over the event: one number a draw. `[..., S, ...]`, with S at `dim`.
        log_p: log p at the same samples, of the same shape.
        dim: the dimension that counts the samples.
        gradient: what the gradient of the result shall be.

    Returns:
        The mean over `dim`, with `dim` removed. Half-precision inputs are computed with in float32.

    Raises:
        ValueError: if the shapes differ, there are no samples, `gradient` is not one of the words, or it is missing
            where `log_q` requires a gradient.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from torch_klloss import kl_from_log_probs
        >>> q, p = Normal(1.0, 1.0), Normal(0.0, 1.0)
        >>> x = q.icdf((torch.arange(1000) + 0.5) / 1000)
        >>> kl_from_log_probs(q.log_prob(x), p.log_prob(x))
        tensor(0.5000)
        >>> (q.log_prob(x).exp() * (q.log_prob(x) - p.log_prob(x))).mean()  # the wrong line
        tensor(0.1410)
    """
    _check(log_q, log_p, dim, gradient)
    log_q, log_p = (t.float() if t.element_size() < 4 else t for t in (log_q, log_p))
    if gradient == "none":
        log_q, log_p = log_q.detach(), log_p.detach()
    if gradient == "score_function":
        return score_function_log_ratio(log_q, log_p, dim).mean(dim)
    return (log_q - log_p).mean(dim)


def _check(log_q: Tensor, log_p: Tensor, dim: int, gradient: str | None) -> None:
    if log_q.shape != log_p.shape:
        raise ValueError(
            f"log_q and log_p must have the same shape, got {tuple(log_q.shape)} and {tuple(log_p.shape)}: sum both "
            "over the event's dimensions (Independent does), or expand one of them on purpose."
        )
    if log_q.dim() == 0 or log_q.shape[dim] == 0:
        raise ValueError(f"log_q must hold at least one sample along dim={dim}, got shape {tuple(log_q.shape)}.")
    if gradient not in (None, *get_args(LogProbGradient)):
        raise ValueError(f"gradient must be 'pathwise', 'score_function' or 'none', got {gradient!r}.")
    if gradient is None and log_q.requires_grad:
        raise ValueError(
            "log_q requires a gradient, and its values do not tell how the samples were made: pass "
            "gradient='pathwise' (the samples came from q.rsample), gradient='score_function' (they came from "
            "q.sample, without a gradient of their own), or gradient='none' (the number alone). The plain mean over "
            "samples without a gradient would be a loss whose expected gradient is zero."
        )
