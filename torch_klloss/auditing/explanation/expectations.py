"""Values of a KL computation with some of its parts replaced, for all probes at once.

The parts of a right computation:

- `spread`: the kind of spread that q's is read as.
- `pair`: the distributions that the loss believes it was given.
- `direction`: the KLs that are summed, each a weight and whether q and p change places.
- `log`, `mean`, `variance`, `constant` (analytic): the terms of log(σp/σq) + (μq - μp)²/(2σp²) + σq²/(2σp²) - ½; `log`
  (sampled) is the log-scale in log q(x).
- `draws` (sampled): takes the pair and standard normal noise, and returns the points x.
- `integrand` (sampled): the function of log q(x) and log p(x) whose mean is taken; `log q level` and `log p level`:
  whether one is joint where the other is of one dimension; `normaliser`: the constant that log q lacks.
- `weight`, `log q`, `log p` (categorical): the parts of Σ q (log q - log p), and `summand`, the function of these;
  `outcomes`: the sum over a Bernoulli's two.
- `bound` (analytic, categorical): takes the elements and the layout, and returns the core.
- `tokens` (categorical): how the tokens of sequences with a mask are reduced, the share of each.
- `latent`, `batch`, `steps`, `scale` (all): a factor, as powers of the latent and batch size and of the number of
  steps, and a constant; `repeated`: whether every example gets its batch's; see `fit.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.observation import Subject
from torch_klloss.auditing.experiment.probes import Categoricals, Layout, Normals, log_density
from torch_klloss.auditing.experiment.signatures import LOG_VARIANCE, ProbedPair
from torch_klloss.auditing.experiment.tokens import Tokens, token_mean
from torch_klloss.auditing.explanation.mistake import Parts

FACTORS = frozenset({"latent", "batch", "steps", "scale", "repeated"})
FORWARD = ((1.0, False),)
REVERSE = ((1.0, True),)

_REPLICATES = 4


@dataclass(frozen=True)
class Core:
    """The value of a computation for every example, before it is reduced over the batch.

    Attributes:
        examples: `[num_examples]`, in nats.
        elements: the terms that they are sums of, `[num_elements]`; None where they do not split.
        std_error: of `examples`, where they are means over the audit's own draws.
        totals: the reduced value of every probe, where it is not the mean of `examples`: of tokens with a mask.
    """

    examples: Tensor
    elements: Tensor | None = None
    std_error: Tensor | None = None
    totals: Tensor | None = None


def misread(subject: Subject, parts: Parts) -> ProbedPair:
    """Return the pair that the loss believes it was given."""
    pair: Any = subject.pair
    if "spread" in parts and (spread := subject.signature.spread) is not None:
        logvars = {"q.": "q_logvar", "p.": "p_logvar", "": "q_logvar"}
        given = {
            name: subject.leaves[side + spread] for side, name in logvars.items() if side + spread in subject.leaves
        }
        pair = replace(pair, **{name: LOG_VARIANCE[parts["spread"]](leaf) for name, leaf in given.items()})
    believed: ProbedPair = parts.get("pair", lambda given: given)(pair)
    return believed


def analytic(pair: Normals, layout: Layout, parts: Parts) -> Core:
    """Return the sum of the closed form's terms."""
    elements = torch.zeros_like(pair.q_mean)
    for weight, is_swapped in parts.get("direction", FORWARD):
        n = pair.swapped if is_swapped else pair
        terms = (parts.get(name, term)(n) for name, term in TERMS.items())
        elements = elements + weight * sum(terms)
    return parts.get("bound", _summed)(elements, layout)


def _summed(elements: Tensor, layout: Layout) -> Core:
    return Core(layout.examples(elements), elements)


TERMS: dict[str, Callable[[Normals], Tensor]] = {
    "log": lambda n: 0.5 * (n.p_logvar - n.q_logvar),
    "mean": lambda n: 0.5 * (n.q_mean - n.p_mean).square() / n.p_var,
    "variance": lambda n: 0.5 * n.q_var / n.p_var,
    "constant": lambda n: torch.full_like(n.q_mean, -0.5),
}


def log_ratio(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return the integrand of the KL."""
    return log_q - log_p


@dataclass(frozen=True)
class _Densities:
    """The log-densities at points, of each dimension `[…, num_elements]` and joint `[…, num_examples]`."""

    log_q: Tensor
    log_p: Tensor
    joint_q: Tensor
    joint_p: Tensor

    def cores(self, layout: Layout, parts: Parts) -> list[Core]:
        log_q, log_p = self.log_q + parts.get("normaliser", 0.0), self.log_p
        if "log q level" in parts:
            log_q = self.joint_q[..., layout.example_of_element]
        if "log p level" in parts:
            log_p = self.joint_p[..., layout.example_of_element]
        integrand = parts.get("integrand", log_ratio)
        elements = integrand(log_q, log_p)
        cores = [Core(layout.examples(elements), elements)]
        if "integrand" in parts and not any(name in parts for name in ("log q level", "log p level")):
            joint_q = self.joint_q + layout.latent[layout.probe_of_example] * parts.get("normaliser", 0.0)
            cores.append(Core(integrand(joint_q, self.joint_p)))
        return cores


def _densities_at(x: Tensor, pair: Normals, layout: Layout, parts: Parts) -> _Densities:
    log_q = log_density(x, pair.q_mean, pair.q_logvar)
    log_p = log_density(x, pair.p_mean, pair.p_logvar)
    if "log" in parts:
        log_q = log_q + parts["log"](pair) - TERMS["log"](pair)
    return _Densities(log_q, log_p, layout.examples(log_q), layout.examples(log_p))


def at_points(x: Tensor, pair: Normals, layout: Layout, parts: Parts) -> list[Core]:
    """Return the integrand at points `x`, `[…, num_elements]`: of each dimension and, if it differs, the joint one."""
    return _densities_at(x, pair, layout, parts).cores(layout, parts)


def at_log_probs(log_q: Tensor, log_p: Tensor, parts: Parts) -> list[Core]:
    """Return the integrand at given log-densities, `[num_examples]`."""
    return [Core(parts.get("integrand", log_ratio)(log_q, log_p))]


class Expectations:
    """Computes expectations of integrands under q from randomised nets, with their standard errors.

    Hypotheses that differ in the integrand alone share their log-densities.
    """

    def __init__(self, subject: Subject, num_draws: int) -> None:
        self._subject = subject
        self._eps = _standard_normals(subject.layout, num_draws)
        self._densities: dict[tuple[object, ...], list[_Densities]] = {}

    def cores(self, parts: Parts) -> list[Core]:
        """Return the expectation of each dimension's integrand and, where it differs, of the joint one."""
        totals: list[Core] = []
        for (weight, _), densities in zip(parts.get("direction", FORWARD), self._shared(parts), strict=True):
            cores = [_averaged(core, weight) for core in densities.cores(self._subject.layout, parts)]
            totals = [_added(a, b) for a, b in zip(totals, cores, strict=True)] if totals else cores
        return totals

    def _shared(self, parts: Parts) -> list[_Densities]:
        key = tuple(parts.get(name) for name in ("spread", "pair", "direction", "log", "draws"))
        if key not in self._densities:
            pair = misread(self._subject, parts)
            self._densities[key] = [
                self._at_draws(pair.swapped if is_swapped else pair, parts)  # type: ignore[arg-type]
                for _, is_swapped in parts.get("direction", FORWARD)
            ]
        return self._densities[key]

    def _at_draws(self, pair: Normals, parts: Parts) -> _Densities:
        x = parts.get("draws", lambda n, eps: n.q_mean + (0.5 * n.q_logvar).exp() * eps)(pair, self._eps)
        return _densities_at(x, pair, self._subject.layout, parts)


def _standard_normals(layout: Layout, num_draws: int) -> Tensor:
    """Return points `[replicates · draws, num_elements]`: one net for all examples, with a dimension per element."""
    num_dims = int(layout.latent.max())
    nets = []
    for replicate in range(_REPLICATES):
        engine = torch.quasirandom.SobolEngine(num_dims, scramble=True, seed=replicate)
        uniform = engine.draw(num_draws, dtype=torch.float64)
        nets.append(torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)))
    first = torch.cat([torch.zeros(1, dtype=torch.long), layout.latent.long()[layout.probe_of_example].cumsum(0)[:-1]])
    dims = torch.arange(len(layout.example_of_element)) - first[layout.example_of_element]
    return torch.cat(nets)[:, dims]


def _averaged(core: Core, weight: float) -> Core:
    means = core.examples.unflatten(0, (_REPLICATES, -1)).mean(1)
    elements = None if core.elements is None else weight * core.elements.mean(0)
    return Core(weight * means.mean(0), elements, abs(weight) * means.std(0) / math.sqrt(_REPLICATES))


def _added(one: Core, other: Core) -> Core:
    elements = None if one.elements is None or other.elements is None else one.elements + other.elements
    error = None
    if one.std_error is not None and other.std_error is not None:
        error = torch.hypot(one.std_error, other.std_error)
    return Core(one.examples + other.examples, elements, error)


def categorical(pair: Categoricals, layout: Layout, parts: Parts) -> Core:
    """Return the sum over the classes."""
    elements = torch.zeros_like(pair.q_logits)
    for share, is_swapped in parts.get("direction", FORWARD):
        c = pair.swapped if is_swapped else pair
        weight = parts.get("weight", lambda c: c.log_q.exp())(c)
        log_q, log_p = parts.get("log q", lambda c: c.log_q)(c), parts.get("log p", lambda c: c.log_p)(c)
        terms = parts.get("summand", lambda weight, log_q, log_p: weight * (log_q - log_p))(weight, log_q, log_p)
        if terms.dim() > 1:  # a Bernoulli's two outcomes
            terms = parts.get("outcomes", lambda both: both.sum(0))(terms)
        elements = elements + share * terms
    return (
        _of_tokens(elements, pair, parts) if isinstance(pair, Tokens) else parts.get("bound", _summed)(elements, layout)
    )


def _of_tokens(elements: Tensor, pair: Tokens, parts: Parts) -> Core:
    """Return the value of every token, and their reduction."""
    examples = pair.by_token.examples(elements)
    totals = pair.totals(examples, parts.get("tokens", token_mean))
    return Core(torch.where(pair.keep, examples, 0.0), totals=totals)
