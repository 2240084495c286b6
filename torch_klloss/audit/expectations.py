"""What a computation with some of its parts replaced returns, for all probes in one go.

The parts, and what they are where nothing is wrong:

- `spread`: what the argument for q's spread is taken for.
- `direction`: which KLs are summed, each a weight and whether q and p change places.
- `log`, `mean`, `variance`, `constant` (analytic): the terms of KL(q‖p) = log(σp/σq) + (μq-μp)²/(2σp²) + σq²/(2σp²) - ½;
  `log` (sampled) is the log-scale in log q(x).
- `integrand` (sampled): the function of log q(x) and log p(x) whose mean is taken; `log q level` and `log p level`:
  whether they are joint where the other is one dimension's; `normaliser`: what log q lacks.
- `weight`, `log q`, `log p` (categorical): the terms of Σ q (log q - log p); `softmax`: the dimension it is taken over.
- `latent`, `batch`, `scale` (all): a factor, as powers of the latent and batch size and a constant; `repeated`: whether
  every example gets its batch's; see `fit.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_klloss.audit.mistake import Parts, keep
from torch_klloss.audit.probes import Categoricals, Layout, Normals
from torch_klloss.audit.signatures import LOG_VARIANCE, Leaves, Signature

FACTORS = frozenset({"latent", "batch", "scale", "repeated"})
FORWARD = ((1.0, False),)

_REPLICATES, _DRAWS = 4, 512


@dataclass(frozen=True)
class Core:
    """Hold what a computation gives for every example before it is reduced over the batch.

    Attributes:
        examples: `[num_examples]`, in nats.
        elements: the terms that these are sums of, `[num_elements]`; None where they do not split.
        std_error: of `examples`, where they come from draws of our own.
    """

    examples: Tensor
    elements: Tensor | None = None
    std_error: Tensor | None = None


def misread(signature: Signature, leaves: Leaves, layout: Layout, parts: Parts) -> Normals | Categoricals:
    """Return the pair that the loss believes it was given."""
    pair = signature.pair(leaves, layout)
    if "spread" not in parts or signature.spread is None:
        return pair
    return replace(pair, q_logvar=LOG_VARIANCE[parts["spread"]](leaves[signature.spread]))


def analytic(pair: Normals, layout: Layout, parts: Parts) -> Core:
    """Return the sum of the closed form's terms."""
    elements = torch.zeros_like(pair.q_mean)
    for weight, is_swapped in parts.get("direction", FORWARD):
        n = pair.swapped if is_swapped else pair
        terms = (keep(parts, name, term)(n) for name, term in TERMS.items())
        elements = elements + weight * sum(terms)
    return Core(layout.examples(elements), elements)


TERMS: dict[str, Callable[[Normals], Tensor]] = {
    "log": lambda n: 0.5 * (n.p_logvar - n.q_logvar),
    "mean": lambda n: 0.5 * (n.q_mean - n.p_mean).square() / n.p_var,
    "variance": lambda n: 0.5 * n.q_var / n.p_var,
    "constant": lambda n: torch.full_like(n.q_mean, -0.5),
}


def log_density(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the log-density of a Normal."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mean).square() / logvar.exp())


def log_ratio(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return the integrand of the KL."""
    return log_q - log_p


def at_points(x: Tensor, pair: Normals, layout: Layout, parts: Parts) -> list[Core]:
    """Return the integrand at the points `x`, `[…, num_elements]`: of each dimension and, where that differs, jointly."""
    log_q = log_density(x, pair.q_mean, pair.q_logvar) + parts.get("normaliser", 0.0)
    log_p = log_density(x, pair.p_mean, pair.p_logvar)
    if "log" in parts:
        log_q = log_q + parts["log"](pair) - TERMS["log"](pair)
    if any(name in parts for name in ("log q level", "log p level")):
        joint_q, joint_p = (layout.examples(part)[..., layout.example_of_element] for part in (log_q, log_p))
        log_q = joint_q if "log q level" in parts else log_q
        log_p = joint_p if "log p level" in parts else log_p
    integrand = keep(parts, "integrand", log_ratio)
    elements = integrand(log_q, log_p)
    cores = [Core(layout.examples(elements), elements)]
    if "integrand" in parts:
        cores.append(Core(integrand(layout.examples(log_q), layout.examples(log_p))))
    return cores


def at_log_probs(log_q: Tensor, log_p: Tensor, parts: Parts) -> list[Core]:
    """Return the integrand at given log-densities, `[num_examples]`."""
    return [Core(keep(parts, "integrand", log_ratio)(log_q, log_p))]


def expected(pair: Normals, layout: Layout, parts: Parts, seed: int) -> list[Core]:
    """Return the expectation of the integrand, from randomised nets of our own, with its standard error."""
    eps = _standard_normals(layout, seed)
    totals: list[Core] = []
    for weight, is_swapped in parts.get("direction", FORWARD):
        n = pair.swapped if is_swapped else pair
        x = n.q_mean + (0.5 * n.q_logvar).exp() * eps
        cores = [_averaged(core, weight) for core in at_points(x, n, layout, parts)]
        totals = [_added(a, b) for a, b in zip(totals, cores, strict=True)] if totals else cores
    return totals


def _standard_normals(layout: Layout, seed: int) -> Tensor:
    """Return points `[replicates · draws, num_elements]`: the same net for each example, a dimension an element."""
    num_dims = int(layout.latent.max())
    nets = []
    for replicate in range(_REPLICATES):
        engine = torch.quasirandom.SobolEngine(num_dims, scramble=True, seed=seed * _REPLICATES + replicate)
        uniform = engine.draw(_DRAWS, dtype=torch.float64)
        nets.append(torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)))
    first = torch.cat([torch.zeros(1, dtype=torch.long), layout.latent.long()[layout.probe_of_example].cumsum(0)[:-1]])
    dims = torch.arange(len(layout.example_of_element)) - first[layout.example_of_element]
    return torch.cat(nets)[:, dims]


def _averaged(core: Core, weight: float) -> Core:
    means = core.examples.reshape(_REPLICATES, _DRAWS, -1).mean(1)
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
        if "softmax" in parts:
            c = _SoftmaxOver(c.q_logits, c.p_logits, layout, parts["softmax"])
        weight = keep(parts, "weight", lambda c: c.log_q.exp())(c)
        log_q, log_p = keep(parts, "log q", lambda c: c.log_q)(c), keep(parts, "log p", lambda c: c.log_p)(c)
        elements = elements + share * keep(parts, "summand", _product)(weight, log_q, log_p)
    return Core(layout.examples(elements), elements)


def _product(weight: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    return weight * (log_q - log_p)


@dataclass(frozen=True)
class _SoftmaxOver(Categoricals):
    """Hold scores whose softmax is taken over another dimension than the classes'."""

    dim: int = 0

    @property
    def log_q(self) -> Tensor:
        return self.layout.row_wise(lambda part: part.log_softmax(self.dim), self.q_logits)

    @property
    def log_p(self) -> Tensor:
        return self.layout.row_wise(lambda part: part.log_softmax(self.dim), self.p_logits)
