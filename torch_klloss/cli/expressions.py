"""Distributions written as text, such as "Normal(0, 1)", read without running any of it."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.distributions import Distribution, ExponentialFamily, Transform, transforms

_MAX_LENGTH = 10_000


def _concrete(module: Any, root: type, *abstract: type) -> dict[str, type]:
    """Return the classes under `root` that a module of torch lists, by name, without the abstract ones."""
    listed = {name: getattr(module, name) for name in module.__all__}
    return {
        name: cls
        for name, cls in listed.items()
        if isinstance(cls, type) and issubclass(cls, root) and cls not in (root, *abstract)
    }


_DISTRIBUTIONS = _concrete(torch.distributions, Distribution, ExponentialFamily)
_CALLABLE = _DISTRIBUTIONS | _concrete(transforms, Transform)
_NUMBERS = {"pi": math.pi, "inf": math.inf, "nan": math.nan}


def parse_distribution(text: str) -> Distribution:
    """Build the distribution that an expression describes, without `eval`.

    An expression is a call of a distribution or transform of `torch.distributions`. Its arguments, by position or by
    name, are numbers (also pi, inf and nan), True, False, None, further calls, and lists or tuples: of numbers, which
    become tensors of the default dtype, or of calls, which stay lists. A number alone stays a number, as torch's
    constructors want it of a count. Nothing else is allowed.

    Args:
        text: the expression.

    Raises:
        ValueError: if the text is no such expression, or torch refuses the arguments; the message is one line.
        TypeError: if `text` is not a string.

    Examples:
        >>> from torch_klloss.cli.expressions import parse_distribution
        >>> parse_distribution("Normal(0, 1)")
        Normal(loc: 0.0, scale: 1.0)
        >>> parse_distribution("Independent(Normal([0, 1], [1, 1]), 1)").event_shape
        torch.Size([2])
        >>> parse_distribution("TransformedDistribution(Normal(0, 1), [ExpTransform()])").support
        GreaterThan(lower_bound=0.0)
        >>> parse_distribution("Norml(0, 1)")
        Traceback (most recent call last):
        ValueError: unknown name 'Norml': did you mean Normal?
    """
    if not isinstance(text, str):
        raise TypeError(f"parse_distribution takes a string such as 'Normal(0, 1)', got {type(text).__name__}.")
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"an expression may have {_MAX_LENGTH} characters, got {len(text)}.")
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval")
        value = _Reader(text).read(tree.body)
    except SyntaxError as error:
        raise ValueError(_syntax_message(text, error)) from None
    except (RecursionError, MemoryError):
        raise ValueError("the expression is nested too deeply.") from None
    if not isinstance(value, Distribution):
        raise ValueError(f"expected a distribution such as Normal(0, 1), got {_shorten(text)}.")
    return value


class _Reader:
    """Turn the nodes of one expression into values. A node of a kind without a reader is refused.

    Args:
        text: the whole expression, for the messages.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.readers: dict[type[ast.expr], Callable[[Any], Any]] = {
            ast.Call: self._call,
            ast.Constant: self._constant,
            ast.List: self._sequence,
            ast.Name: self._name,
            ast.Tuple: self._sequence,
            ast.UnaryOp: self._sign,
        }

    def read(self, node: ast.expr) -> Any:
        reader = self.readers.get(type(node))
        return self._refuse(node) if reader is None else reader(node)

    def source(self, node: ast.expr) -> str:
        """Return a node as the user wrote it, on one line."""
        return _shorten(ast.get_source_segment(self.text, node) or ast.unparse(node))

    def _call(self, node: ast.Call) -> Any:
        if not isinstance(node.func, ast.Name):
            self._refuse(node.func)
        cls = _CALLABLE.get(node.func.id)
        if cls is None:
            _refuse_name(node.func.id)
        names = [keyword.arg for keyword in node.keywords]
        if None in names or len(set(names)) < len(names):
            raise ValueError(
                f"{self.source(node)}: each parameter is named once, and unpacking with ** is not allowed."
            )
        arguments = [self.read(argument) for argument in node.args]
        keywords = {str(keyword.arg): self.read(keyword.value) for keyword in node.keywords}
        try:
            return _build(cls, arguments, keywords)
        except Exception as error:  # whatever a constructor raises, it is about the arguments that the user wrote
            raise ValueError(f"{self.source(node)}: {_reason(error)}") from error

    def _constant(self, node: ast.Constant) -> Any:
        if node.value is not None and type(node.value) not in (bool, int, float):
            self._refuse(node)
        return node.value

    def _name(self, node: ast.Name) -> float:
        if node.id in _CALLABLE:
            raise ValueError(f"{node.id} must be called, as in {node.id}(...).")
        if node.id not in _NUMBERS:
            _refuse_name(node.id)
        return _NUMBERS[node.id]

    def _sign(self, node: ast.UnaryOp) -> float:
        value = self.read(node.operand) if isinstance(node.op, ast.UAdd | ast.USub) else self._refuse(node)
        if type(value) not in (int, float):
            raise ValueError(f"{self.source(node)}: a sign belongs before a number.")
        return -value if isinstance(node.op, ast.USub) else +value

    def _sequence(self, node: ast.List | ast.Tuple) -> Any:
        if any(isinstance(part, ast.Call) for part in ast.walk(node)):
            return [self.read(part) for part in node.elts]
        try:
            return torch.tensor(self._numbers(node), dtype=torch.get_default_dtype())
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.source(node)}: no rectangular array of numbers: {first_line(error)}") from None

    def _numbers(self, node: ast.expr) -> Any:
        if isinstance(node, ast.List | ast.Tuple):
            return [self._numbers(part) for part in node.elts]
        value = self.read(node)
        if value is None:
            raise ValueError("None among them")
        return value

    def _refuse(self, node: ast.expr) -> NoReturn:
        raise ValueError(
            f"{self.source(node)}: {_kind(node)} is not allowed; an expression is made of calls of torch's "
            "distributions and transforms, numbers, True, False, None, lists and tuples."
        )


# Names for the kinds of nodes whose class name is no word.
_KINDS = {
    "BinOp": "an operator other than a sign",
    "BoolOp": "an operator other than a sign",
    "Call": "calling the result of a call",
    "Compare": "a comparison",
    "DictComp": "a comprehension",
    "GeneratorExp": "a comprehension",
    "IfExp": "a condition",
    "JoinedStr": "an f-string",
    "ListComp": "a comprehension",
    "NamedExpr": "an assignment",
    "SetComp": "a comprehension",
    "Starred": "unpacking with *",
    "UnaryOp": "an operator other than a sign",
}


def _kind(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return f"a value of type {type(node.value).__name__}"
    kind = type(node).__name__
    return _KINDS.get(kind, f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind.lower()}")


def _build(cls: type, arguments: list[Any], keywords: dict[str, Any]) -> Any:
    signature = inspect.signature(cls)
    try:
        bound = signature.bind(*arguments, **keywords)
    except TypeError as error:
        raise TypeError(f"{error}; the parameters are {', '.join(signature.parameters)}.") from error
    if "temperature" in bound.arguments:  # the one parameter that torch takes as a number and then fails on
        bound.arguments["temperature"] = torch.as_tensor(
            bound.arguments["temperature"], dtype=torch.get_default_dtype()
        )
    for name, is_bad, wanted in _UNCHECKED.get(cls.__name__, ()):
        if name in bound.arguments and is_bad(bound.arguments[name]):
            raise ValueError(f"{name} must be {wanted}, got {bound.arguments[name]!r}.")
    return cls(*bound.args, **bound.kwargs)


def _is_no_count(value: Any) -> bool:
    return type(value) is not int or value < 0


def _holds_zero(value: Any) -> bool:
    return bool((torch.as_tensor(value) == 0).any())


# Arguments that torch takes as they come and that make no distribution: name, check, and what is wanted.
_UNCHECKED: dict[str, tuple[tuple[str, Callable[[Any], bool], str], ...]] = {
    "AffineTransform": (("scale", _holds_zero, "other than 0"),),
    "Independent": (("reinterpreted_batch_ndims", _is_no_count, "an integer of at least 0"),),
    "PowerTransform": (("exponent", _holds_zero, "other than 0"),),
}


def _refuse_name(name: str) -> NoReturn:
    near = difflib.get_close_matches(name, [*_CALLABLE, *_NUMBERS], n=1)
    if not near:  # get_close_matches minds the case
        near = [known for known in _CALLABLE if known.lower() == name.lower()]
    hint = f"did you mean {near[0]}?" if near else "the names are those of torch.distributions."
    raise ValueError(f"unknown name {name!r}: {hint}")


def _reason(error: Exception) -> str:
    """Return on one line why torch refused the arguments."""
    message = str(error)
    invalid = re.search(
        r"Expected parameter (\w+) .*? to satisfy the constraint (.*), but found invalid values:\s*(.*)", message, re.S
    )
    if invalid:
        parameter, constraint, values = invalid.groups()
        values = re.sub(r"tensor\((.*?)(, dtype=.*)?\)$", r"\1", " ".join(values.split()))
        values = re.sub(r"(\d\.)(?!\d)", r"\g<1>0", values)
        return f"parameter {parameter} must satisfy {constraint}, got {_shorten(values)}"
    return first_line(error)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _syntax_message(text: str, error: SyntaxError) -> str:
    column = f" at column {error.offset}" if error.offset else ""
    return f"cannot read {_shorten(text)!r}: {error.msg.split(';')[0]}{column}."


def _shorten(text: str, width: int = 72) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
