"""The roles that names in a training step suggest: KL, mean, spread, q, p, weight, sample."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch_klloss.auditing.experiment.names import BY_NAMES, MOMENT_WORDS, P_WORDS, Q_WORDS, words_of


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_KL_WORDS = _set("kl kls kld klds dkl kldiv klloss kldloss kldivergence")
_NO_KL_WORDS = _set(
    "weight weights coef coeff coefficient beta factor scale mask anneal annealing annealer target step steps ratio "
    "max min threshold lambda lam warmup w fn start end rate schedule scheduler epoch epochs capacity gamma alpha "
    "input lr idx"
)
_KL_PHRASES = frozenset({"latent_loss", "latent_cost"})
WEIGHT_WORDS = _NO_KL_WORDS & _set(
    "weight weights coef coeff coefficient beta factor scale anneal annealing lambda lam w rate gamma alpha"
)
TEMPERATURE_WORDS = _set("t temp temperature tau")
_DATA_WORDS = _set("x px recon rec reconstruction out output dec decoder likelihood obs pred kl kld grad")
SAMPLE_NAME = re.compile(BY_NAMES["samples"][0].replace("|x|", "|"))


def is_kl_name(name: str) -> bool:
    """Return whether a name suggests a KL, and not its weight or schedule."""
    words = words_of(name)
    named = bool(_KL_WORDS & set(words)) or any(phrase in "_".join(words) for phrase in _KL_PHRASES)
    return named and not _NO_KL_WORDS & set(words)


def side_of(name: str) -> str:
    """Return whether a distribution or moment of that name is of "q" or "p"; "" if the name does not tell."""
    words = set(words_of(name))
    if words & P_WORDS or re.fullmatch(BY_NAMES["distributions"][1], name.lower()):
        return "p"
    return "q" if words & Q_WORDS or re.fullmatch(BY_NAMES["distributions"][0], name.lower()) else ""


def is_of_data(name: str) -> bool:
    """Return whether a name suggests the data or their reconstruction, and no latent."""
    return side_of(name) != "q" and bool(set(words_of(name)) & _DATA_WORDS)


def level_of(words: Iterable[str]) -> tuple[str, ...]:
    """Return the words of a name other than those for q, p and moments: the level of a hierarchy."""
    return tuple(w for w in words if w not in Q_WORDS | P_WORDS | MOMENT_WORDS and w not in ("dist", "qs", "ps"))
