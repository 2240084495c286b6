"""Recorded references: what takes long to compute in mpmath, kept in `recorded.json` draw by draw.

A truth is found by the bits of the parameters that it belongs to, so that a draw which comes out otherwise on another
processor, or after a change of the regimes, is computed anew and never compared with a wrong number. The table holds
the hash of the source that computed it; with another source it is not read, and a test names the command that records
it anew. The environment variable `REFERENCES` decides what is done with the table:

    recorded    read it (the default)
    anew        compute everything, and compare what is kept with it (`make test-all`)
    record      compute everything, and write the table (`make references`)
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mpmath
import numpy as np
import torch

from tests.references.reference import Params, Reference

HERE = Path(__file__).parent
TABLE = HERE / "recorded.json"
MODE = os.environ.get("REFERENCES", "recorded")
COMMAND = "make references"
KEY_BYTES = 4  # enough for the few hundred draws that a group has
NOT_KEPT = {"gaussian.py", "harness.py", "recorded.py", "targets.py", "worst_cases.py"}
"""The modules beside this one that compute no truth that is kept."""

Group = tuple[str, str, bool]
"""A pair's name, a dtype's, and whether the gradient is kept as well."""


class Truth(NamedTuple):
    """The KL of one draw, and its derivatives by every entry of the parameters: none where the KL is infinite."""

    kl: Any
    gradient: list[Any]


Records = dict[Group, dict[bytes, Truth]]
_written: Records = {}


def truths(reference: Reference, q: Params, p: Params, with_gradient: bool) -> list[Truth]:
    """Return the truth of every draw of a batch, with its gradient if that is wanted."""
    dtype, keys = _dtype(q), _keys(q, p)
    known = kept(reference, q, p, with_gradient) if reference.recorded and MODE != "record" else [None] * len(keys)
    found = []
    with mpmath.workdps(reference.digits):
        for i, truth in enumerate(known):
            if truth is None or MODE != "recorded":
                computed = _computed(reference, q, p, i, with_gradient)
                assert truth is None or agree(truth, computed, dtype), f"{reference.name}: {truth} was recorded"
                if MODE == "record" and reference.recorded and agree(rounded(computed, dtype), computed, dtype):
                    _written.setdefault(_group(reference, q, with_gradient), {})[keys[i]] = computed
            found.append(truth or computed)
    return found


def kept(reference: Reference, q: Params, p: Params, with_gradient: bool) -> list[Truth | None]:
    """Return what the table has for every draw of a batch."""
    known = records(_group(reference, q, with_gradient))
    return [known.get(key) for key in _keys(q, p)]


def agree(record: Truth, truth: Truth, dtype: torch.dtype) -> bool:
    """Return whether a record has all the digits of the truth that are kept."""
    if not mpmath.isfinite(truth.kl):
        return bool(record.kl == truth.kl)
    digits, digits_of_gradient = (100, 50) if dtype == torch.float64 else (50, 22)
    largest = max(map(abs, truth.gradient), default=0)
    gaps = (abs(a - b) for a, b in zip(record.gradient, truth.gradient, strict=True))
    is_near = abs(record.kl - truth.kl) <= mpmath.ldexp(abs(truth.kl), -digits)
    return bool(is_near and all(gap <= mpmath.ldexp(largest, -digits_of_gradient) for gap in gaps))


def rounded(truth: Truth, dtype: torch.dtype) -> Truth:
    """Return what is kept of a truth."""
    return _decoded(*_encoded(truth, dtype))


def source_hash(sources: Mapping[str, str] | None = None) -> str:
    """Return the hash of the modules that compute what is kept, without their docstrings and comments."""
    if sources is None:
        paths = (path for path in sorted(HERE.glob("*.py")) if path.name not in NOT_KEPT)
        sources = {path.name: path.read_text() for path in paths}
    text = "\n".join(f"{name}\n{_structure(_without_docstrings(source))}" for name, source in sources.items())
    return hashlib.sha256(text.encode()).hexdigest()


def _structure(node: Any) -> str:
    """Return a syntax tree as text, the same for every Python: `ast.unparse` and `ast.dump` have changed."""
    if isinstance(node, ast.AST):
        fields = [f"{name}={_structure(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
        return f"{type(node).__name__}({', '.join(fields)})"
    return f"[{', '.join(map(_structure, node))}]" if isinstance(node, list) else repr(node)


@cache
def table(path: Path = TABLE) -> dict[Group, dict[str, Any]]:
    """Return the rows of the table by their group; none if another source computed them."""
    content = json.loads(path.read_text())
    rows = content["rows"] if content["source"] == source_hash() else []
    return {(row["pair"], row["dtype"], row["gradient"] is not None): row for row in rows}


@cache
def records(group: Group, path: Path = TABLE) -> dict[bytes, Truth]:
    """Return what the table has of a pair and a dtype, by the keys of the draws."""
    row = table(path).get(group)
    with mpmath.workprec(120):
        return {} if row is None else _read(row)


def save(truths_of: Records | None = None, path: Path = TABLE) -> None:
    """Write the table, by default of what this process recorded, one pair and dtype a line."""
    groups = sorted((_written if truths_of is None else truths_of).items())
    rows = ",\n".join(json.dumps(_row(*group), ensure_ascii=False) for group in groups)
    path.write_text(f'{{"source": "{source_hash()}", "rows": [\n{rows}\n]}}\n')


def _computed(reference: Reference, q: Params, p: Params, i: int, with_gradient: bool) -> Truth:
    exact = _exact(q, i), _exact(p, i)
    kl = reference.kl(*exact)
    return Truth(kl, reference.gradient_at(*exact) if with_gradient and mpmath.isfinite(kl) else [])


def _exact(params: Params, i: int) -> dict[str, Any]:
    """Return the i-th draw as mpf: each float is a binary number and converts without rounding."""
    exact = {}
    for key, t in params.items():
        row = t[i].detach().double().numpy()
        exact[key] = mpmath.mpf(row.item()) if row.ndim == 0 else np.vectorize(mpmath.mpf, otypes=[object])(row)
    return exact


def _keys(q: Params, p: Params) -> list[bytes]:
    """Return for every draw what its truth is found by."""
    tensors = [t.detach().numpy() for side in (q, p) for t in side.values()]
    return [
        hashlib.sha256(b"".join(t[i].tobytes() for t in tensors)).digest()[:KEY_BYTES] for i in range(len(tensors[0]))
    ]


def _group(reference: Reference, q: Params, with_gradient: bool) -> Group:
    return reference.name, str(_dtype(q)).removeprefix("torch."), with_gradient


def _dtype(params: Params) -> torch.dtype:
    return next(iter(params.values())).dtype


def _encoded(truth: Truth, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """Return the KL as the sum of one or two doubles, and the gradient in the precision of the dtype."""
    kl = [float(truth.kl)]
    if dtype == torch.float64:
        kl.append(float(truth.kl - kl[0]) if mpmath.isfinite(kl[0]) else 0.0)
    with np.errstate(over="ignore"):
        return kl, np.array([float(entry) for entry in truth.gradient], dtype=_of_gradient(dtype)).tolist()


def _decoded(kl: list[float], gradient: list[float]) -> Truth:
    exact = mpmath.mpf(kl[0]) + (kl[1] if len(kl) > 1 else 0)
    return Truth(exact, [mpmath.mpf(entry) for entry in gradient] if mpmath.isfinite(exact) else [])


def _of_gradient(dtype: torch.dtype) -> str:
    return "<f8" if dtype == torch.float64 else "<f4"


def _row(group: Group, truth_of: dict[bytes, Truth]) -> dict[str, Any]:
    pair, name, with_gradient = group
    dtype = getattr(torch, name)
    encoded = [_encoded(truth, dtype) for truth in truth_of.values()]
    row: dict[str, Any] = {"pair": pair, "dtype": name, "draws": _to_text(b"".join(truth_of))}
    row["kl"] = _to_text(np.array([kl for kl, _ in encoded], dtype="<f8").tobytes())
    row["gradient"] = None
    if with_gradient:
        size = max(len(gradient) for _, gradient in encoded)
        padded = [gradient or [0.0] * size for _, gradient in encoded]  # nothing is kept beside an infinite KL
        row["gradient"] = _to_text(np.array(padded, dtype=_of_gradient(dtype)).tobytes())
    return row


def _read(row: dict[str, Any]) -> dict[bytes, Truth]:
    dtype = getattr(torch, row["dtype"])
    draws = _from_text(row["draws"])
    keys = [draws[i : i + KEY_BYTES] for i in range(0, len(draws), KEY_BYTES)]
    kls = np.frombuffer(_from_text(row["kl"]), dtype="<f8").reshape(len(keys), -1).tolist()
    gradients: list[list[float]] = [[] for _ in keys]
    if row["gradient"] is not None:
        numbers = np.frombuffer(_from_text(row["gradient"]), dtype=_of_gradient(dtype))
        gradients = numbers.reshape(len(keys), -1).tolist()
    return {key: _decoded(*numbers) for key, *numbers in zip(keys, kls, gradients, strict=True)}


def _to_text(data: bytes) -> str:
    return base64.b85encode(data).decode()


def _from_text(text: str) -> bytes:
    return base64.b85decode(text)


def _without_docstrings(source: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = list(_statements(node.body))
    return tree


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
            yield statement
