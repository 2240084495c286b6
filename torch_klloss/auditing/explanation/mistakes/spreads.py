"""Mistakes with q's spread: one of standard deviation, its logarithm, variance, log-variance taken for another."""

from collections.abc import Mapping

from torch_klloss.auditing.experiment.signatures import SIGNATURES, Spread
from torch_klloss.auditing.explanation.mistake import Mistake

_WORDS: Mapping[Spread, str] = {
    "std": "standard deviation",
    "logstd": "log standard deviation",
    "var": "variance",
    "logvar": "log-variance",
}
# What makes a KL from each, with {} for the argument's name.
_FORMULA: Mapping[Spread, str] = {
    "std": "(0.5 * (mean**2 + {0}**2 - 1) - {0}.abs().log()).sum(-1).mean()",
    "logstd": "(0.5 * (mean**2 + (2 * {0}).exp() - 1) - {0}).sum(-1).mean()",
    "var": "(0.5 * (mean**2 + {0} - 1 - {0}.log())).sum(-1).mean()",
    "logvar": "-0.5 * (1 + {0} - mean**2 - {0}.exp()).sum(-1).mean()",
}


def _taken_for(given: Spread, taken: Spread) -> Mistake:
    parts = {"spread": taken}
    return Mistake(
        id=f"{given}-as-{taken}",
        what=f"it takes the {_WORDS[given]} for a {_WORDS[taken]}",
        fix=f"Give it what it takes, or read the argument as the {_WORDS[given]} that it is.",
        signature=f"mean_{given}",
        wrong=_FORMULA[taken].format(given),
        analytic=parts,
        sampled=parts,
        only=frozenset(name for name, signature in SIGNATURES.items() if signature.spread == given),
    )


MISTAKES = tuple(_taken_for(given, taken) for given in _WORDS for taken in _WORDS if given != taken)
