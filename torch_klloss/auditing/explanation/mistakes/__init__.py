"""The catalogue: one file for each nature of mistake, one declaration for each mistake."""

from torch_klloss.auditing.explanation.mistakes import (
    classes,
    directions,
    entropies,
    gradients,
    reductions,
    samples,
    spreads,
    terms,
    tokens,
)

_NATURES = (samples, reductions, spreads, directions, terms, entropies, classes, tokens, gradients)
CATALOGUE = tuple(mistake for nature in _NATURES for mistake in nature.MISTAKES)
"""Every mistake that the audit knows; the question's own comes first."""

__all__ = ["CATALOGUE"]
