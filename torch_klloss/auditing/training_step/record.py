"""Records of a training step: its functions with their variables, and the numbers that are named like a KL."""

from __future__ import annotations

import dis
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from torch_klloss.auditing.training_step.names import SAMPLE_NAME, side_of
from torch_klloss.elbo import ELBOTerms


@dataclass(frozen=True)
class NamedValue:
    """A value with its label in the code, and the name that determines its role."""

    label: str
    role: str
    value: Any


@dataclass
class FunctionRecord:
    """The state of one of the user's functions when it returned.

    Attributes:
        frame: kept, so that no other frame gets its identity.
        nth: the number of earlier returns of this function.
        parent: the nearest caller among the user's functions.
        values: the local variables, and attributes of `self`.
        parameters: the names of its parameters.
        returned: what it returned.
        line: where it returned.
        called: the (q, p) of the `kl_divergence` calls in it.
        points: the points at which densities were evaluated in it, and the samples drawn.
    """

    frame: FrameType
    nth: int
    parent: FrameType | None
    values: list[NamedValue]
    parameters: frozenset[str]
    returned: Any
    line: int
    called: list[tuple[Distribution, Distribution]] = field(default_factory=list)
    points: list[Tensor] = field(default_factory=list)

    @property
    def code(self) -> CodeType:
        """The code of the function."""
        return self.frame.f_code

    @property
    def place(self) -> tuple[CodeType, int]:
        """The key by which it is found in another run."""
        return self.code, self.nth

    @property
    def samples(self) -> list[Tensor]:
        """The points, and the variables that are named like samples."""
        named = (v for v in self.values if SAMPLE_NAME.fullmatch(v.role.lower()))
        return [*self.points, *(v.value for v in named if isinstance(v.value, Tensor))]


@dataclass(frozen=True)
class Number:
    """A number that is named like a KL.

    Attributes:
        label: its label in the code.
        role: the name that determines its role.
        record: of the function that has it.
        live: the tensor, with its graph.
        value: a copy of the tensor.
        version: of the tensor when it was copied.
        own: whether it was made here, and not handed in.
        line: where it was assigned, logged or returned.
    """

    label: str
    role: str
    record: FunctionRecord
    live: Tensor | None
    value: Tensor
    version: int
    own: bool
    line: int

    @property
    def place(self) -> tuple[CodeType, int, str]:
        """The key by which it is found in another run."""
        return *self.record.place, self.label


@dataclass(frozen=True)
class LossCall:
    """A call of one of this library's losses."""

    path: str
    where: str
    q: Distribution
    p: Distribution
    output: Tensor
    per_example: float


def is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two numbers are equal up to rounding."""
    if one.shape != other.shape:
        return False
    return torch.allclose(one.double(), other.double(), rtol=1e-6, atol=0.0, equal_nan=True)


def location(frame: FrameType, line: int) -> str:
    """Return a line of a function, "file.py:line in function"."""
    code = frame.f_code
    name = getattr(code, "co_qualname", code.co_name).split("<locals>.")[-1]
    return f"{Path(code.co_filename).name}:{line} in {name}"


def values_of(frame: FrameType) -> Iterator[NamedValue]:
    """Yield the variables of a function, and the attributes of the module whose method it is."""
    owner = owner_name(frame.f_code)
    for name, value in frame.f_locals.items():
        if name == owner and isinstance(value, nn.Module):
            for key, part in vars(value).items():
                if isinstance(part, (Tensor, Distribution, float, int)):
                    yield NamedValue(f"{name}.{key}", key, part)
            for key, part in (*value._parameters.items(), *value._buffers.items()):
                if part is not None and side_of(key) == "p":
                    yield NamedValue(f"{name}.{key}", key, part)
        else:
            yield from _entries(name, value)


def owner_name(code: CodeType) -> str:
    """Return the name of the first parameter, which is the object if the function is a method."""
    return code.co_varnames[0] if code.co_argcount else ""


def _entries(name: str, value: Any) -> Iterator[NamedValue]:
    """Yield a variable, or the entries of a dictionary, a list or a record."""
    if isinstance(value, (Tensor, Distribution, float, int)):
        yield NamedValue(name, name, value)
    elif isinstance(value, ELBOTerms):
        return  # right by construction
    elif isinstance(value, Mapping):
        yield from (NamedValue(f"{name}[{k!r}]", k, v) for k, v in value.items() if isinstance(k, str))
    elif hasattr(value, "_fields"):
        yield from (NamedValue(f"{name}.{k}", k, getattr(value, k)) for k in value._fields)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (NamedValue(f"{name}.{f.name}", f.name, getattr(value, f.name)) for f in fields(value))
    elif isinstance(value, (list, tuple)):
        role = name[:-1] if name.endswith("s") and len(name) > 2 else name
        yield from (NamedValue(f"{name}[{i}]", f"{role}_{i}", v) for i, v in enumerate(value[:32]))


def line_of(code: CodeType, label: str) -> int | None:
    """Return the last line that assigns a variable."""
    name = label.removeprefix(f"{owner_name(code)}.").split("[")[0].split(".")[0]
    starts = list(dis.findlinestarts(code))
    found = None
    for step in dis.get_instructions(code):
        if step.opname.startswith("STORE_") and step.argval == name:
            found = max((start for start in starts if start[0] <= step.offset and start[1]), default=(0, None))[1]
    return found
