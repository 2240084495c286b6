"""The KL of a policy's sequences from a reference's, from sequences that were sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from torch_klloss.language.logits import LinearHead, Logits, VocabShards, check_temperature, side_of, sides_of
from torch_klloss.language.token_kl import log_probs
from torch_klloss.language.tokens import (
    Normalizer,
    TokenReduction,
    Tokens,
    check_ids,
    check_token_reduction,
    is_readable,
    tokens_of,
)
from torch_klloss.language.weight import Weighted
from torch_klloss.log_probs import LogProbValue, kl_from_log_probs
from torch_klloss.methods.monte_carlo.tail_diagnostics import may_have_heavy_tail
from torch_klloss.numerics.arguments import check_tensors, check_word
from torch_klloss.numerics.exponentials import expm1
from torch_klloss.numerics.softmax.divergence import divergence_of_logits
from torch_klloss.numerics.softmax.pairs import KL
from torch_klloss.numerics.tracing import without_autocast
from torch_klloss.schedules import Schedule

Estimator: TypeAlias = Literal["exact", "k1", "k3"]
ReferenceGradient: TypeAlias = Literal["full", "token", "none"]

_WRONG = {
    "pathwise": "sampled tokens carry no gradient, so that the expected gradient of k1 as a loss is zero, and that of "
    "k3 is the gradient of KL(reference‖policy), the other direction",
    "advantage": "the exact KL of a step does not depend on the token that was drawn there, so that as this token's "
    "advantage its expected gradient is exactly zero; it counts for the tokens before it",
    "ratio": "the ratio of a token alone leaves the prefix with the behaviour policy: on two tokens the value is "
    "0.1381 for 0.1414, and the gradient is biased; the ratio of the whole prefix is exact",
}


class ReferenceKL(Weighted):
    """The KL of a policy's sequences from a reference's, KL(policy‖reference), in nats, from sampled sequences.

    `policy[:, t]` is the law of `tokens[:, t]`, given the tokens before it. With ℓ_t = log π(y_t) - log ρ(y_t) of the
    policy π and the reference ρ, at y drawn from the policy:

    - "exact": Σ_t KL_t, the exact KL of every step along the sampled prefixes. It is unbiased, never negative, and its
      variance is never above that of k1: only the prefixes are sampled.
    - "k1": Σ_t ℓ_t, unbiased.
    - "k3": Σ_t (1/r - 1 + log r) with r = π/ρ, or of the whole sequence with gradient="full": unbiased, never negative.

    The gradient is chosen apart from the value:

    - "full": that of the KL of the sequences, to the policy and the reference. A step is also charged for what it does
      to later ones: ∇ KL_t + KL_t · Σ_{u<t} ∇ log π(y_u) for "exact"; the score function for the others.
    - "token": that of every step's KL with its prefix held fixed. **It lacks the score of the future**: a policy is not
      charged for leading to prefixes where it is far from the reference.
    - "none": no gradient to either side.

    Off policy, `log_behavior` weighs every step by the ratio policy over behaviour. "exact" needs that of the prefix
    *without* the token itself; it is exact in value and gradient, with one factor fewer than "k1" and "k3" need.

    Args:
        estimator: "exact", "k1" or "k3".
        gradient: "full", "token" or "none".
        temperature: by which both logits are divided.
        reduction: "sequence_sum", the mean over sequences of their sums, or "sum"; with gradient "token" and "none"
            also "token_mean", "sequence_mean" or "none".
        weight: the factor of the loss, a number of at least 0 or a Schedule. The attribute `weight` may be set, and
            `KLAnnealing` sets it.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if an option is unknown, or would have another gradient than the KL's.

    References:
        *Better estimation of the Kullback-Leibler divergence between language models* (Amini, Vieira and Cotterell,
        2025), for the exact steps. *On a few pitfalls in KL divergence gradient estimation for RL* (Tang and Munos,
        2025), for the score of the future. *Approximating KL divergence* (Schulman, 2020), for k1 and k3.

    Examples:
        >>> import torch
        >>> from torch_klloss.language import ReferenceKL
        >>> policy, reference = torch.zeros(1, 2, 2, requires_grad=True), torch.tensor([[[0.0, 1.0], [0.0, 2.0]]])
        >>> loss = ReferenceKL()(policy=policy, reference=reference, tokens=torch.tensor([[0, 1]]))
        >>> loss.backward()
        >>> loss, policy.grad[0, 0]  # the second: of the first step, and of the way to the second
        (tensor(0.5539, grad_fn=<MulBackward0>), tensor([ 0.4669, -0.4669]))
    """

    def __init__(
        self,
        estimator: Estimator = "exact",
        *,
        gradient: ReferenceGradient = "full",
        temperature: float = 1.0,
        reduction: TokenReduction = "sequence_sum",
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        check_word("estimator", estimator, Estimator)
        _check_gradient(estimator, gradient)
        check_temperature(temperature)
        check_token_reduction(reduction)
        if gradient == "full" and reduction not in ("sequence_sum", "sum"):
            raise ValueError(
                f"gradient='full' needs reduction='sequence_sum' or 'sum', got {reduction!r}: the number of tokens of "
                "a sequence depends on the policy, so that the gradient of a mean over tokens is another one. Take "
                "gradient='token' for a mean over steps with their prefixes held fixed."
            )
        self.estimator, self.gradient = estimator, gradient
        self.temperature = temperature
        self.reduction: TokenReduction = reduction

    def forward(
        self,
        *positional: object,
        policy: Logits | None = None,
        reference: Logits | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        log_behavior: Tensor | None = None,
        normalizer: Normalizer | None = None,
        step: float | None = None,
    ) -> Tensor:
        """Return the reduced KL.

        Args:
            positional: none; all arguments go by name.
            policy: logits `[batch, time, vocabulary]`: a tensor, a `LinearHead` or `VocabShards`; with "k1" and "k3"
                also the log-probabilities of the tokens, `[batch, time]`.
            reference: the same, of the reference.
            tokens: the sampled ids, `[batch, time]`; needed for log-probabilities from logits, and for the full
                gradient and `log_behavior`.
            mask: bool or weights of at least 0, `[batch, time]`: which tokens the policy wrote. With "k1", "k3" and
                gradient="full" it must be bool.
            log_behavior: the log-probabilities of the tokens under the policy that they were drawn from, `[batch,
                time]`; None if that is the policy itself.
            normalizer: replaces the denominator of "token_mean", "sequence_mean" and "sequence_sum".
            step: the step at which a Schedule of the weight is evaluated.

        Returns:
            A scalar; `[batch, time]` with reduction="none".

        Raises:
            TypeError: if an argument is of the wrong kind, or given without its name.
            ValueError: if shapes differ, an id is out of range, nothing is valid, or what was given does not suffice.
        """
        _by_name(positional, policy, reference)
        check_token_reduction(self.reduction, normalizer)
        if self.estimator == "exact":
            value = self._exact(policy, reference, tokens, mask, log_behavior, normalizer)
        else:
            value = self._sampled(policy, reference, tokens, mask, log_behavior, normalizer)
        return value * self.weight_at(step)

    if TYPE_CHECKING:  # torch's has no types

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...  # noqa: D102

    def rewards(
        self,
        *positional: object,
        policy: Logits | None = None,
        reference: Logits | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        step: float | None = None,
    ) -> Tensor:
        """Return minus the k1 penalty of every token, to be added to a reward: `[batch, time]`, without a gradient.

        The score function of the rewards-to-go then has the gradient of the KL of the sequences, times the weight.

        Args:
            positional: none; all arguments go by name.
            policy: as in `forward`.
            reference: as in `forward`.
            tokens: as in `forward`.
            mask: as in `forward`; tokens that do not count get 0.
            step: as in `forward`.

        Raises:
            TypeError, ValueError: as `forward`; and for the estimators "exact" and "k3".
        """
        _by_name(positional, policy, reference)
        if self.estimator != "k1":
            raise ValueError(_NO_REWARD[self.estimator])
        log_q, log_p, found = self.log_probs(policy, reference, tokens, mask)
        penalty = found.weighted(_kept(log_q.detach() - log_p.detach(), found))
        return -self.weight_at(step) * penalty

    def _exact(self, policy: Any, reference: Any, tokens: Any, mask: Any, log_behavior: Any, normalizer: Any) -> Tensor:
        if not isinstance(policy, (LinearHead, VocabShards)) and isinstance(policy, Tensor) and policy.dim() < 3:
            raise ValueError(
                "estimator='exact' needs logits [batch, time, vocabulary], got a policy of shape "
                f"{tuple(policy.shape)}: the KL of a step is a sum over all tokens, which the log-probabilities of the "
                "sampled ones do not tell. Take ReferenceKL('k1') for log-probabilities."
            )
        sides = sides_of(("policy", "reference"), policy, reference)
        shape, device = sides.q.shape[:-1], sides.q.tensors[0].device
        _check_sequences(shape)
        found = tokens_of(shape, device, mask=mask)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient != "none"), without_autocast(device):
            steps = divergence_of_logits(
                sides.q, sides.p, KL, temperature=self.temperature, keep=found.keep, **sides.reduces
            )
        if tokens is None:
            if log_behavior is not None or (self.gradient == "full" and steps.requires_grad):
                raise ValueError(
                    "estimator='exact' needs tokens, the sampled ids [batch, time], for gradient='full' and for "
                    "log_behavior: a step is charged for what it does to later ones. gradient='token' needs none."
                )
            return found.reduce(steps, self.reduction, normalizer)
        ids = check_ids("tokens", tokens, shape, None)
        ids = ids if found.keep is None else torch.where(found.keep, ids, -100)
        with torch.set_grad_enabled(steps.requires_grad and self.gradient == "full"):
            log_q = log_probs(side_of("policy", policy), ids, self.temperature, None if found.keep is None else -100)
        weights = _prefix_weights(log_q, log_behavior, found)
        terms = steps if weights is None else torch.where(weights == 0, 0.0, steps * weights)
        if log_q.requires_grad:
            terms = terms + terms.detach().nan_to_num(posinf=0.0) * _null(_before(log_q))
        return found.reduce(terms, self.reduction, normalizer)

    def _sampled(
        self, policy: Any, reference: Any, tokens: Any, mask: Any, log_behavior: Any, normalizer: Any
    ) -> Tensor:
        log_q, log_p, found = self.log_probs(policy, reference, tokens, mask)
        if self.gradient == "none":
            log_q, log_p = log_q.detach(), log_p.detach()
        if log_behavior is not None:
            log_behavior = _checked_behavior(log_behavior, found)
        value: LogProbValue = "k1" if self.estimator == "k1" else "k3"
        if self.gradient == "full":
            return self._of_sequences(log_q, log_p, found, log_behavior, normalizer, value)
        log_q, log_p = _kept(log_q, found), _kept(log_p, found)
        if log_behavior is not None:  # the ratio of the prefix up to and including the token
            ratio = (log_q - _kept(log_behavior, found)).detach().cumsum(-1)
            log_behavior = (log_q.detach() - ratio).unsqueeze(0)
        terms = kl_from_log_probs(
            log_q.unsqueeze(0),
            log_p.unsqueeze(0),
            gradient="none" if self.gradient == "none" else "k2",
            value=value,
            log_behavior=log_behavior,
            mask=torch.ones_like(log_q).unsqueeze(0),
        )
        return found.reduce(terms, self.reduction, normalizer)

    def _of_sequences(
        self, log_q: Tensor, log_p: Tensor, found: Tokens, log_behavior: Any, normalizer: Any, value: LogProbValue
    ) -> Tensor:
        mask = found.weights
        if mask is not None and mask.dtype is not torch.bool:
            raise ValueError(
                f"with gradient='full' the mask says which tokens were written, and must be bool, got {mask.dtype}."
            )
        is_empty = mask is not None and normalizer is None and self.reduction != "sum"
        if is_empty and mask is not None and is_readable(mask) and not bool(mask.any()):
            found.reduce(log_q, self.reduction, None)  # raises
        return kl_from_log_probs(
            log_q,
            log_p,
            gradient="score_function",
            value=value,
            mask=mask,
            log_behavior=log_behavior,
            normalizer=1 if self.reduction == "sum" else normalizer,
            token_dim=1,
            level="sequence",
        )

    def log_probs(self, policy: Any, reference: Any, tokens: Any, mask: Any) -> tuple[Tensor, Tensor, Tokens]:
        """Return the log-probabilities of the tokens under both, and the tokens."""
        are_logits = [not isinstance(t, Tensor) or t.dim() == 3 for t in (policy, reference)]
        if any(are_logits) and tokens is None:
            raise ValueError(
                f"estimator={self.estimator!r} needs tokens, the sampled ids [batch, time], to take their "
                "log-probabilities from logits [batch, time, vocabulary]."
            )
        if not all(are_logits):
            check_tensors(
                **{n: t for n, t, is_l in zip(_NAMES, (policy, reference), are_logits, strict=True) if not is_l}
            )
        sides: list[Any] = [
            side_of(n, t) if is_l else t for n, t, is_l in zip(_NAMES, (policy, reference), are_logits, strict=True)
        ]
        shape = sides[0].side.shape[:-1] if are_logits[0] else sides[0].shape
        _check_sequences(shape)
        device = sides[0].device
        found = tokens_of(shape, device, mask=mask)
        logs = []
        for name, side, is_l in zip(_NAMES, sides, are_logits, strict=True):
            if is_l:
                ids = check_ids("tokens", tokens, shape, None)
                ids = ids if found.keep is None else torch.where(found.keep, ids, -100)
                logs.append(log_probs(side, ids, self.temperature, None if found.keep is None else -100))
            elif side.shape != shape or not side.is_floating_point():
                raise ValueError(
                    f"{name} must be log-probabilities [batch, time] {tuple(shape)}, got {tuple(side.shape)}."
                )
            elif self.temperature != 1:
                raise ValueError(
                    f"temperature={self.temperature!r} divides logits, but {name} holds log-probabilities: compute "
                    "these at the temperature, log_probs_of(logits, tokens, temperature=...), and leave it out here."
                )
            else:
                logs.append(side)
        wide = torch.promote_types(torch.promote_types(logs[0].dtype, logs[1].dtype), torch.float32)
        return logs[0].to(wide), logs[1].to(wide), found

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        weight = self.schedule if self.schedule is not None else self.weight
        lacks = " (without the score of the future)" if self.gradient == "token" else ""
        return (
            f"estimator={self.estimator!r}, gradient={self.gradient!r}{lacks}, temperature={self.temperature!r}, "
            f"reduction={self.reduction!r}, weight={weight!r}"
        )


_NAMES = ("policy", "reference")

_NO_REWARD = {
    "exact": "estimator='exact' gives no rewards: as a reward the exact KL of a step charges only the tokens before "
    "it, and the step's own part must be backpropagated. The loss has both; for rewards take ReferenceKL('k1').",
    "k3": "estimator='k3' gives no rewards: its score adds a term, E[r - 1 - log r] differentiated through the policy "
    "has ρ/π in it, which is not part of the KL's gradient. Take ReferenceKL('k1').rewards.",
}


def _check_gradient(estimator: str, gradient: Any) -> None:
    if isinstance(gradient, str) and gradient in _WRONG:
        raise ValueError(
            f"gradient={gradient!r} is refused for estimator={estimator!r}: {_WRONG[gradient]}. Take gradient='full', "
            "or 'token' for steps with their prefixes held fixed."
        )
    if gradient not in get_args(ReferenceGradient):
        check_word("gradient", gradient, ReferenceGradient)


def _by_name(positional: tuple[object, ...], policy: object, reference: object) -> None:
    if positional or policy is None or reference is None:
        raise TypeError(
            "policy and reference must be given by name, loss(policy=..., reference=..., tokens=...), so that the "
            "direction of the KL cannot be mistaken."
        )


def _check_sequences(shape: torch.Size) -> None:
    if len(shape) != 2:
        raise ValueError(
            f"policy and reference must be of sequences, [batch, time] tokens, got {len(shape)} dimensions of tokens "
            f"{tuple(shape)}: unsqueeze(0) for a single sequence."
        )


def _checked_behavior(log_behavior: Any, found: Tokens) -> Tensor:
    check_tensors(log_behavior=log_behavior)
    checked: Tensor = log_behavior
    if checked.shape != found.shape:
        raise ValueError(
            f"log_behavior must have the shape of the tokens {tuple(found.shape)}, got {tuple(checked.shape)}."
        )
    return checked.detach()


def _prefix_weights(log_q: Tensor, log_behavior: Any, found: Tokens) -> Tensor | None:
    """Return the ratio of policy and behaviour over the tokens before each one; without a gradient."""
    if log_behavior is None:
        return None
    log_behavior = _checked_behavior(log_behavior, found).to(log_q.dtype)
    exponent = _before(_kept(log_q.detach() - log_behavior, found))
    kept = exponent if found.keep is None else torch.where(found.keep, exponent, -torch.inf)
    if is_readable(kept):
        may_have_heavy_tail(
            kept, "ReferenceKL(log_behavior=...)", "Draw the sequences from a policy closer to this one."
        )
    return exponent.exp()


def _before(values: Tensor) -> Tensor:
    """Return the sums over the earlier tokens."""
    return torch.nn.functional.pad(values[..., :-1].cumsum(-1), (1, 0))


def _kept(values: Tensor, found: Tokens) -> Tensor:
    return values if found.keep is None else torch.where(found.keep, values, 0.0)


def _null(values: Tensor) -> Tensor:
    """Return zeros with the derivatives of the ratio to what the values are now, those of every order."""
    finite = torch.where(values.isfinite(), values, 0.0)
    return expm1(finite - finite.detach())
