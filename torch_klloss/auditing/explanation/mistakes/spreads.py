"""Mistakes with q's spread: one of standard deviation, its logarithm, variance, log-variance taken for another."""

from collections.abc import Mapping

from torch_klloss.auditing.experiment.signatures import SIGNATURES, SPREAD_WORDS, Spread
from torch_klloss.auditing.explanation.mistake import Mistake

# The KL in terms of each, with {} for the argument's name.
_FORMULA: Mapping[Spread, str] = {
    "std": "(0.5 * (mean**2 + {0}**2 - 1) - {0}.abs().log()).sum(-1).mean()",
    "logstd": "(0.5 * (mean**2 + (2 * {0}).exp() - 1) - {0}).sum(-1).mean()",
    "var": "(0.5 * (mean**2 + {0} - 1 - {0}.log())).sum(-1).mean()",
    "logvar": "-0.5 * (1 + {0} - mean**2 - {0}.exp()).sum(-1).mean()",
    "rho": "(0.5 * (mean**2 + F.softplus({0})**2 - 1) - F.softplus({0}).log()).sum(-1).mean()",
}


def _taken_for(given: Spread, taken: Spread) -> Mistake:
    parts = {"spread": taken}
    return Mistake(
        id=f"{given}-as-{taken}",
        what=f"it takes the {SPREAD_WORDS[given]} for a {SPREAD_WORDS[taken]}",
        fix=f"Give it what it takes, or read the argument as the {SPREAD_WORDS[given]} that it is.",
        signature=f"mean_{given}",
        wrong=_FORMULA[taken].format(given),
        analytic=parts,
        sampled=parts,
        only=frozenset(name for name, signature in SIGNATURES.items() if signature.spread == given),
    )


MISTAKES = tuple(_taken_for(given, taken) for given in SPREAD_WORDS for taken in SPREAD_WORDS if given != taken)
