"""Mistakes, declared by the parts of a right computation that they replace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Parts = Mapping[str, Any]

ANALYTIC, SAMPLED, CATEGORICAL = "analytic", "sampled", "categorical"
"""The forms of a computation: a formula in the parameters, an estimate from samples, a sum over classes."""


@dataclass(frozen=True)
class Mistake:
    """A mistake: its effect on what a loss returns, in words and in parts.

    A computation is made of named parts (`expectations.py` lists them), of which a mistake replaces some. Two
    mistakes can be made together where they replace different parts, so that pairs need no declaration.

    Attributes:
        id: a short name with hyphens, for reports and tests.
        what: what the loss does, as a sentence that begins with "it".
        fix: what to do about it, as a sentence.
        signature: the signature of the example.
        wrong: a wrong loss in that signature's arguments, as an expression.
        analytic: the parts that it replaces in a formula for two Normals.
        sampled: the parts that it replaces in an estimate from samples of q.
        categorical: the parts that it replaces in a sum over classes.
        only: the signatures that it can occur in; None for all whose form it has parts for.
        gradient: for a mistake with a right value, the kind of gradient that the parameters of "q" and "p" get, as
            `gradient.py` names them.
        num_dims: of the arguments of the example.
    """

    id: str
    what: str
    fix: str
    signature: str
    wrong: str
    analytic: Parts | None = None
    sampled: Parts | None = None
    categorical: Parts | None = None
    only: frozenset[str] | None = None
    gradient: Mapping[str, str] | None = None
    num_dims: int = 2

    def parts(self, form: str) -> Parts | None:
        """Return the parts that it replaces in a computation of `form`, or None where it cannot occur there."""
        found: Parts | None = getattr(self, form)
        return found

    def occurs_in(self, signature: str) -> bool:
        """Return whether a loss with that signature can make this mistake."""
        return self.only is None or signature in self.only


@dataclass(frozen=True)
class Hypothesis:
    """Mistakes that are made together, and the parts that they replace.

    Attributes:
        mistakes: empty for a right loss.
        parts: the replaced parts.
    """

    mistakes: tuple[Mistake, ...] = ()
    parts: Parts = field(default_factory=dict)

    @property
    def ids(self) -> frozenset[str]:
        """The names of the mistakes."""
        return frozenset(mistake.id for mistake in self.mistakes)


def hypotheses(mistakes: Iterable[Mistake], form: str, signature: str, at_most: int = 2) -> list[Hypothesis]:
    """Return the hypotheses of no mistake, of every mistake that can occur, and of up to `at_most` of them together."""
    possible = [(mistake, mistake.parts(form)) for mistake in mistakes if mistake.occurs_in(signature)]
    single = [Hypothesis((mistake,), parts) for mistake, parts in possible if parts is not None]
    found, last = [Hypothesis()], [Hypothesis()]
    for _ in range(at_most):
        last = [joined for earlier in last for one in single if (joined := _joined(earlier, one)) is not None]
        found += last
    return found


def _joined(earlier: Hypothesis, one: Hypothesis) -> Hypothesis | None:
    """Return both together, or None where they replace the same part or are joined already in the other order."""
    if earlier.mistakes and earlier.mistakes[-1].id >= one.mistakes[0].id:
        return None
    if earlier.parts.keys() & one.parts.keys():
        return None
    return Hypothesis((*earlier.mistakes, *one.mistakes), {**earlier.parts, **one.parts})
