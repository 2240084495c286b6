"""The worst inputs that a search found for each pair: the search, and the table that keeps them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tests.references.harness import Errors, draw, errors_at
from tests.references.reference import Params, Reference
from tests.references.targets import GRADIENT, target
from torch_klloss import kl_divergence

TABLE = Path(__file__).parents[2] / "benchmarks" / "worst_cases.json"
DTYPES = {"float32": torch.float32, "float64": torch.float64}

Of = Literal["value", "gradient"]


@dataclass(frozen=True)
class WorstCase:
    """One input and the error there.

    Args:
        pair: the name of the reference.
        dtype: "float32" or "float64".
        of: whether it is the error of the value or of the gradient.
        used: the error divided by the one allowed.
        ulp: the error of the value there, in units in the last place.
        gradient: the error of the gradient there; None where it was not computed.
        q: the parameters of q, as hexadecimal floats, which lose no bit.
        p: the parameters of p.
    """

    pair: str
    dtype: str
    of: Of
    used: float
    ulp: float
    gradient: float | None
    q: dict[str, Any]
    p: dict[str, Any]

    def params(self, reference: Reference) -> tuple[Params, Params]:
        """Return the parameters as a batch of one."""
        return tuple(_batch(side, DTYPES[self.dtype], reference.constants) for side in (self.q, self.p))  # type: ignore[return-value]


def load(path: Path = TABLE) -> list[WorstCase]:
    """Return the table; empty if there is none yet."""
    return [WorstCase(**row) for row in json.loads(path.read_text())] if path.exists() else []


def save(cases: list[WorstCase], path: Path = TABLE) -> None:
    """Write the table, one case a line."""
    rows = sorted((dataclasses.asdict(case) for case in cases), key=lambda row: (row["pair"], row["dtype"], row["of"]))
    path.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")


def used_by(reference: Reference, errors: Errors, q: Params, p: Params, of: Of) -> list[float]:
    """Return, for every draw, the error divided by the one allowed."""
    dtype = next(iter(q.values())).dtype
    if of == "gradient":
        return [error / GRADIENT[dtype] for error in errors.gradient]
    return target(reference, dtype).used(errors, reference, q, p)


def evaluate(reference: Reference, q: Params, p: Params, of: Of) -> list[WorstCase]:
    """Return the case of every draw of a batch."""
    errors = errors_at(reference, q, p, with_gradient=of == "gradient")
    dtype = str(next(iter(q.values())).dtype).removeprefix("torch.")
    return [
        WorstCase(
            reference.name,
            dtype,
            of,
            used,
            errors.ulp[i],
            errors.gradient[i] if of == "gradient" else None,
            *({key: _to_hex(t[i].tolist()) for key, t in side.items()} for side in (q, p)),
        )
        for i, used in enumerate(used_by(reference, errors, q, p, of))
    ]


def search(
    reference: Reference, dtype: torch.dtype, of: Of, seconds: float, seed: int, known: WorstCase | None = None
) -> WorstCase:
    """Climb the error from random starts until the time is over, and return the worst input found.

    A start is the worst of a few draws of a regime. A step changes one parameter, or one entry of it, by a
    random factor, and is kept if the error grows; it stays within the range that the regimes span.

    Args:
        reference: the pair.
        dtype: of the parameters.
        of: whether it is the error of the value that climbs, or of the gradient.
        seconds: the time to climb.
        seed: of the starts and of the steps.
        known: a worst input found before, which is climbed from first, and returned if nothing worse turns up.
    """
    end = time.monotonic() + seconds
    rng = np.random.default_rng(seed)
    is_in_range = _ranges(reference, dtype)
    before = [] if known is None else evaluate(reference, *known.params(reference), of)
    starts = itertools.chain(before, _starts(reference, dtype, of, seed))
    worst = start = next(starts)
    while True:
        worst = max(worst, _climb(reference, start, is_in_range, rng, end), key=lambda case: case.used)
        if time.monotonic() > end or math.isinf(worst.used):
            return worst
        start = next(starts)


def _starts(reference: Reference, dtype: torch.dtype, of: Of, seed: int, num_draws: int = 16) -> Iterator[WorstCase]:
    for attempt in itertools.count(1000 * seed):
        for regime in reference.regimes:
            drawn = draw(reference, regime, dtype, num_draws, attempt)
            yield max(evaluate(reference, *drawn, of), key=lambda case: case.used)


def _climb(
    reference: Reference,
    case: WorstCase,
    is_in_range: Callable[[Params, Params], bool],
    rng: np.random.Generator,
    end: float,
    patience: int = 60,
) -> WorstCase:
    failures = 0
    while failures < patience and time.monotonic() < end and math.isfinite(case.used):
        q, p = _step(reference, *case.params(reference), rng)
        failures += 1
        if is_in_range(q, p) and _is_fair(reference, q, p):
            found = evaluate(reference, q, p, case.of)[0]
            if found.used > case.used:
                case, failures = found, 0
    return case


def _step(reference: Reference, q: Params, p: Params, rng: np.random.Generator) -> tuple[Params, Params]:
    """Multiply a parameter of one side, or of both sides alike, or a single entry of it, by a random factor near 1."""
    keys = [(side, key) for side in (0, 1) for key in (q, p)[side] if key not in reference.constants]
    side, key = keys[rng.integers(len(keys))]
    size = math.exp(rng.uniform(math.log(1e-8), math.log(0.5)))
    t = (q, p)[side][key].detach()
    factor = 1 + size * torch.from_numpy(np.asarray(rng.standard_normal(t.shape)))
    if rng.random() < 0.5 and t.numel() > 1:
        keep = torch.ones(t.numel(), dtype=torch.bool)
        keep[rng.integers(t.numel())] = False
        factor = torch.where(keep.view(t.shape), 1.0, factor)
    changed = [dict(q), dict(p)]
    for other in (0, 1):
        together = other == side or (key in changed[other] and rng.random() < 0.25)
        if together and changed[other][key].shape == factor.shape:
            old = changed[other][key]
            changed[other][key] = (old.detach() * factor).to(old.dtype).requires_grad_()
    return changed[0], changed[1]


def _is_fair(reference: Reference, q: Params, p: Params) -> bool:
    """Return whether torch accepts the parameters, and p has the support of q.

    A step may lead out of a simplex, or to an indefinite matrix; and outside of p's support the references, being
    formulas, go on to a finite number.
    """
    try:
        pair = reference.build(q, p)
    except ValueError:
        return False
    return not kl_divergence(*pair).isposinf().any()


def _ranges(reference: Reference, dtype: torch.dtype, num_draws: int = 1000) -> Callable[[Params, Params], bool]:
    """Return the test whether parameters lie in the range that the regimes, pooled, span."""
    pools = [draw(reference, regime, dtype, num_draws) for regime in reference.regimes]
    spans = [
        {
            key: (min(pool[side][key].min() for pool in pools), max(pool[side][key].max() for pool in pools))
            for key in keys
        }
        for side, keys in enumerate(pools[0])
    ]

    def contains(q: Params, p: Params) -> bool:
        return all(
            bool((low <= t.min()) & (t.max() <= high))
            for side, span in zip((q, p), spans, strict=True)
            for t, (low, high) in ((side[key], span[key]) for key in side)
        )

    return contains


def _to_hex(value: Any) -> Any:
    return [_to_hex(v) for v in value] if isinstance(value, list) else re.sub("[.]?0*p", "p", float(value).hex())


def _from_hex(value: Any) -> Any:
    return [_from_hex(v) for v in value] if isinstance(value, list) else float.fromhex(value)


def _batch(side: dict[str, Any], dtype: torch.dtype, constants: frozenset[str]) -> Params:
    tensors = {key: torch.tensor([_from_hex(value)], dtype=torch.float64).to(dtype) for key, value in side.items()}
    return {key: t.requires_grad_(key not in constants) for key, t in tensors.items()}
