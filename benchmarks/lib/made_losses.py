"""Losses that make mistakes of the audit's catalogue: one at a time or several, in the arguments of any signature.

The computation is written here as a user would write it, in standard deviations, with draws of its own; from the
catalogue come the parts that a mistake replaces, and from `auditing` the containers that these take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from torch_klloss.auditing import Mistake
from torch_klloss.auditing.experiment.probes import Bernoullis, Categoricals, Layout, MixedNormals, Normals
from torch_klloss.auditing.experiment.signatures import SIGNATURES, mixing
from torch_klloss.auditing.explanation.mistake import ANALYTIC, CATEGORICAL, SAMPLED

Loss = Callable[..., Tensor]
Reduction = Literal["mean", "sum", "none"]
Parts = dict[str, Any]

_COMBINE: Mapping[str, Callable[[Any, Any], Any]] = {
    "scale": lambda one, other: one * other,
    "latent": lambda one, other: one + other,
    "batch": lambda one, other: one + other,
}
_LOG_VARIANCE: Mapping[str | None, Callable[[Tensor], Tensor]] = {
    "std": lambda std: 2 * std.abs().log(),
    "logstd": lambda logstd: 2 * logstd,
    "var": lambda var: var.log(),
    "logvar": lambda logvar: logvar,
    "rho": lambda rho: 2 * softplus(rho).log(),
}
_TERMS: Mapping[str, Callable[[Normals], Tensor]] = {
    "log": lambda n: ((0.5 * n.p_logvar).exp() / (0.5 * n.q_logvar).exp()).log(),
    "mean": lambda n: ((n.q_mean - n.p_mean) / (0.5 * n.p_logvar).exp()) ** 2 / 2,
    "variance": lambda n: (n.q_logvar - n.p_logvar).exp() / 2,
    "constant": lambda n: torch.full_like(n.q_mean, -0.5),
}


@dataclass(frozen=True)
class MadeLoss:
    """A loss that makes mistakes on purpose.

    Attributes:
        signature: the name of its signature.
        form: of its computation: "analytic", "sampled" or "categorical".
        parts: the parts that replace the right ones.
        reduction: over the examples; where a mistake concerns the batch, "mean".
        joint: for samples of Normals: whether it adds the log-densities of the latent dimensions up first.
    """

    signature: str
    form: str
    parts: Parts
    reduction: Reduction = "mean"
    joint: bool = False

    def __call__(self, *arguments: Any) -> Tensor:
        """Return the loss of the signature's arguments."""
        compute = {ANALYTIC: self._formula, SAMPLED: self._estimate, CATEGORICAL: self._sum_over_classes}[self.form]
        terms, latent = compute(arguments)
        examples = terms if terms.dim() == 1 else terms.sum(-1)
        examples = examples * latent ** self.parts.get("latent", 0) * self.parts.get("scale", 1.0)
        batch = len(examples)
        if "repeated" in self.parts:
            return (examples.sum() * batch ** self.parts.get("batch", 0)).expand(batch)
        if power := self.parts.get("batch", 0):
            return examples.mean() / batch if power < 0 else examples.sum() * batch
        return {"mean": examples.mean, "sum": examples.sum, "none": lambda: examples}[self.reduction]()

    def _formula(self, arguments: tuple[Any, ...]) -> tuple[Tensor, int]:
        pair = self._normals(arguments)
        terms = torch.zeros_like(pair.q_mean)
        for weight, n in self._directions(pair):
            terms = terms + weight * sum(self.parts.get(name, right)(n) for name, right in _TERMS.items())
        if self.signature == "multivariate":
            terms = terms.reshape(arguments[0].mean.shape)
        return terms, terms.shape[-1]

    def _estimate(self, arguments: tuple[Any, ...]) -> tuple[Tensor, int]:
        integrand = self.parts.get("integrand", lambda log_q, log_p: log_q - log_p)
        if self.signature == "log_probs":
            return integrand(*arguments), 1
        pair = self._normals(arguments)
        if self.signature == "multivariate":
            flat = pair.q_mean, pair.q_logvar, pair.p_mean, pair.p_logvar
            pair = Normals(*(part.reshape(arguments[0].mean.shape) for part in flat))
        total: Any = 0
        for weight, n in self._directions(pair):
            x = arguments[0] if self.signature == "samples" else self._draw(n)
            log_q, log_p = self._log_densities(self.parts.get("points", lambda x: x)(x), n)
            total = total + weight * integrand(log_q, log_p)
        return total, pair.q_mean.shape[-1]

    def _draw(self, n: Normals) -> Tensor:
        noise = torch.randn_like(n.q_mean)
        return self.parts["draws"](n, noise) if "draws" in self.parts else n.q_mean + (0.5 * n.q_logvar).exp() * noise

    def _log_densities(self, x: Tensor, n: Normals) -> tuple[Tensor, Tensor]:
        q = (n.q_mean, n.q_logvar)
        log_q = _log_normal(x, *(part.detach() if "fixed q" in self.parts else part for part in q))
        log_p = _log_normal(x, n.p_mean, n.p_logvar)
        if "log" in self.parts:
            log_q = log_q + self.parts["log"](n) - _TERMS["log"](n)
        single_q = log_q + self.parts.get("normaliser", 0.0)
        if "log q level" in self.parts or "log p level" in self.parts:
            joint = log_q.sum(-1, keepdim=True), log_p.sum(-1, keepdim=True)
            return (
                joint[0].expand_as(x) if "log q level" in self.parts else single_q,
                joint[1].expand_as(x) if "log p level" in self.parts else log_p,
            )
        return (single_q.sum(-1), log_p.sum(-1)) if self.joint else (single_q, log_p)

    def _sum_over_classes(self, arguments: tuple[Any, ...]) -> tuple[Tensor, int]:
        q, p = self._scores(arguments)
        kind = Bernoullis if self.signature == "bernoulli" else Categoricals
        given = kind(q.reshape(-1), p.reshape(-1), Layout((tuple(q.shape),)))
        total = torch.zeros_like(q)
        for weight, c in self._directions(self.parts.get("pair", lambda given: given)(given)):
            log_q, log_p = (_log_probabilities(side, q.shape, kind) for side in (c.q_logits, c.p_logits))
            shape = log_q.shape
            weights = self.parts["weight"](c).reshape(shape) if "weight" in self.parts else log_q.exp()
            log_q = (
                self.parts["log q"](c).expand(log_q.reshape(-1, q.numel()).shape) if "log q" in self.parts else log_q
            )
            log_p = (
                self.parts["log p"](c).expand(log_p.reshape(-1, q.numel()).shape) if "log p" in self.parts else log_p
            )
            terms = self.parts.get("summand", lambda w, a, b: w * (a - b))(
                weights, log_q.reshape(shape), log_p.reshape(shape)
            )
            if kind is Bernoullis:
                terms = self.parts.get("outcomes", lambda both: both.sum(0))(terms)
            total = total + weight * terms
        return total, q.shape[-1]

    def _normals(self, arguments: tuple[Any, ...]) -> Normals:
        taken = self.parts.get("spread", SIGNATURES[self.signature].spread)
        if self.signature == "multivariate":
            pair = _unmixed(*arguments)
        elif SIGNATURES[self.signature].roles == ("q", "p"):
            q, p = arguments
            pair = Normals(q.mean, 2 * q.stddev.log(), p.mean, 2 * p.stddev.log())
        elif len(arguments) == 4:
            q_mean, q_spread, p_mean, p_spread = arguments
            pair = Normals(q_mean, _LOG_VARIANCE[taken](q_spread), p_mean, _LOG_VARIANCE[taken](p_spread))
        else:
            mean, spread = arguments[-2:]
            zero = torch.zeros_like(mean)
            pair = Normals(mean, _LOG_VARIANCE[taken](spread), zero, zero)
        return self.parts.get("pair", lambda given: given)(pair)

    def _scores(self, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        if self.signature.startswith("uniform_"):
            (given,) = arguments
            return given.log() if self.signature == "uniform_probs" else given, torch.zeros_like(given)
        one, other = arguments
        if self.signature == "kl_div":
            return other.log(), one
        if self.signature == "kl_div_log_target":
            return other, one
        return (one, other) if self.signature == "logits" else (one.logits, other.logits)

    def _directions(self, pair: Any) -> Iterable[tuple[float, Any]]:
        for weight, is_swapped in self.parts.get("direction", ((1.0, False),)):
            yield weight, pair.swapped if is_swapped else pair


def _unmixed(q: Any, p: Any) -> MixedNormals:
    """Return the pair before the map that makes its covariances full, with the map."""
    shape = tuple(q.mean.shape)
    inverse = torch.linalg.inv(mixing(shape)).to(q.mean)
    moments = []
    for d in (q, p):
        covariance = inverse @ d.covariance_matrix @ inverse.mT
        diagonal = covariance.diagonal(dim1=-2, dim2=-1)
        moments += [(inverse @ d.mean[..., None]).reshape(-1), diagonal.log().reshape(-1)]
    return MixedNormals(*moments, Layout((shape,)), [mixing(shape).to(q.mean)])


def _log_normal(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    std = (0.5 * logvar).exp()
    return -(((x - mean) / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2


def _log_probabilities(scores: Tensor, shape: torch.Size, kind: type) -> Tensor:
    """Return the log-probabilities of the classes, or of a Bernoulli's two outcomes, `[2, *shape]`."""
    scores = scores.reshape(shape)
    return torch.stack([logsigmoid(scores), logsigmoid(-scores)]) if kind is Bernoullis else scores.log_softmax(-1)


def made(
    signature: str, mistakes: Iterable[Mistake], form: str, *, reduction: Reduction = "mean", joint: bool = False
) -> MadeLoss | None:
    """Return the loss that makes these mistakes, or None where no loss of this form can make all of them."""
    parts: Parts = {}
    for mistake in mistakes:
        replaced = mistake.parts(form) if mistake.gradient is None else None
        if replaced is None or any(name in parts and name not in _COMBINE for name in replaced):
            return None
        for name, part in replaced.items():
            parts[name] = _COMBINE[name](parts[name], part) if name in parts else part
    return MadeLoss(signature, form, parts, reduction, joint)


# --- mistakes of the gradient alone -----------------------------------------------------------------------------------


def _k3(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_p - log_q).exp() - 1 - (log_p - log_q)


def _detached(x: Tensor) -> Tensor:
    return x.detach()


def _std_detached(n: Normals) -> Normals:
    return replace(n, q_logvar=n.q_logvar.detach())


_WRAPPERS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no-gradient": lambda kl, first: kl.detach(),
    "gradient-scaled": lambda kl, first: 0.3 * kl + 0.7 * kl.detach(),
    "gradient-reversed": lambda kl, first: 2 * kl.detach() - kl,
    "gradient-of-something-else": lambda kl, first: kl + (first - first.detach()).sum(),
}
_PARTS: Mapping[str, tuple[str, Parts]] = {
    "parameter-without-gradient": (ANALYTIC, {"pair": _std_detached}),
    "detached-samples": (SAMPLED, {"points": _detached}),
    "gradient-of-other-direction": (SAMPLED, {"points": _detached, "integrand": _k3}),
    "gradient-of-difference": (SAMPLED, {"fixed q": True, "integrand": _k3}),
}


def _first(arguments: tuple[Any, ...]) -> Tensor:
    """Return a parameter of q."""
    if isinstance(arguments[0], torch.distributions.Distribution):
        return arguments[0].logits if hasattr(arguments[0], "logits") else arguments[0].mean
    return arguments[0]


def made_of_gradient(signature: str, mistake: Mistake) -> tuple[Loss, str] | None:
    """Return the loss with a right value and this mistake in its gradient, and its form; None if it cannot be made."""
    is_categorical, is_log_probs = SIGNATURES[signature].categorical, signature == "log_probs"
    if mistake.id in _WRAPPERS:
        form = CATEGORICAL if is_categorical else SAMPLED if SIGNATURES[signature].given_samples else ANALYTIC
        right, wrap = MadeLoss(signature, form, {}), _WRAPPERS[mistake.id]
        return (lambda *arguments: wrap(right(*arguments), _first(arguments))), form
    if mistake.id in _PARTS and not is_categorical and not is_log_probs:
        form, parts = _PARTS[mistake.id]
        return MadeLoss(signature, form, parts, joint=True), form
    return None
