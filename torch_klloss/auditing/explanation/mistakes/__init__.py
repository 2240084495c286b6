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
)

CATALOGUE = (
    *samples.MISTAKES,
    *reductions.MISTAKES,
    *spreads.MISTAKES,
    *directions.MISTAKES,
    *terms.MISTAKES,
    *entropies.MISTAKES,
    *classes.MISTAKES,
    *gradients.MISTAKES,
)
"""Every mistake that the audit knows; the question's own comes first."""

__all__ = ["CATALOGUE"]
