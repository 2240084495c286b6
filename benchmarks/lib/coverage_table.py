"""The file of true KLs that benchmarks/coverage.py compares with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch.distributions import AffineTransform, Independent, TransformedDistribution

from lib.coverage_laws import law_of
from lib.coverage_truth import UNDEFINED, Truth, infinite, true_kl
from torch_klloss.cli.example_pairs import Example, same_shape

TABLE = Path(__file__).parents[1] / "coverage_truth.json"
Truths = dict[tuple[str, str], Truth]


def write_truth(examples: Sequence[Example], path: Path = TABLE) -> None:
    """Compute the true KL of every ordered pair, and write those that are defined: [value, error] or why it is inf."""
    laws = {e.name: (law_of(e.q), law_of(e.p)) for e in examples}
    pairs = list(same_shape(examples))
    found: dict[str, dict[str, Any]] = {}
    for q, p in track(pairs, "integrating", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        truth = true_kl(laws[q.name][0], laws[p.name][1])
        if truth.kind != "undefined":
            cell = truth.reason or [truth.value, float(f"{truth.error:.1e}")]
            found.setdefault(q.name, {})[p.name] = cell
    parts = {"parameters": {e.name: parameters_of(e) for e in examples}, "truth": found}
    lines = [f" {json.dumps(part)}: {{\n{_lines(content)}\n }}" for part, content in parts.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _lines(content: dict[str, Any]) -> str:
    return ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())


def load_truth(examples: Sequence[Example], path: Path = TABLE) -> Truths:
    """Return the truth of every ordered pair of the examples.

    Raises:
        ValueError: if the file is of other examples.
    """
    table = json.loads(path.read_text())
    changed = [e.name for e in examples if table["parameters"].get(e.name) != parameters_of(e)]
    if changed:
        raise ValueError(
            f"{path.name} must be of the examples in torch_klloss.cli.example_pairs, but {', '.join(changed)} changed; "
            "run benchmarks/coverage.py --write-truth."
        )
    return {(q.name, p.name): _truth(table["truth"].get(q.name, {}).get(p.name)) for q, p in same_shape(examples)}


def _truth(cell: Any) -> Truth:
    if cell is None:
        return UNDEFINED
    return infinite(cell) if isinstance(cell, str) else Truth("finite", *cell)


def parameters_of(example: Example) -> list[list[float]]:
    """Return the parameters of q, and of p, as numbers."""
    return [
        [x for t in _parameters(d) for x in torch.as_tensor(t, dtype=torch.float64).flatten().tolist()]
        for d in (example.q, example.p)
    ]


def _parameters(d: Any) -> Iterator[Any]:
    parts = [getattr(d, key, None) for key in ("mixture_distribution", "component_distribution")]
    if type(d) in (Independent, TransformedDistribution):  # and not those that are built of one in secret
        parts.append(d.base_dist)
    parts += [t for t in getattr(d, "transforms", ()) if isinstance(t, AffineTransform)]
    for part in parts:
        if part is not None:
            yield from (part.loc, part.scale) if isinstance(part, AffineTransform) else _parameters(part)
    for key in (*getattr(d, "arg_constraints", ()), *_UNDECLARED):
        if key not in _DERIVED and hasattr(d, key):
            yield getattr(d, key)


_UNDECLARED = ("temperature", "total_count", "dim")
_DERIVED = ("logits", "covariance_matrix", "precision_matrix")
