"""The roles that names in a training step suggest: KL, mean, spread, q, p, weight, sample."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch_klloss.auditing.experiment.parameters import BY_NAMES


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
_MOMENT_WORDS = _set(
    "mu mus mean means m loc log var vars logvar logvars variance lv sigma sigmas std stds logstd logsigma logscale "
    "scale sd stddev dev rho lsigma ls sq squared square s v sigma2 std2"
)
_Q_WORDS = _set("q posterior post enc encoder qz z zx inference approx guide variational latent")
_P_WORDS = _set("p prior pz pri")
_DATA_WORDS = _set("x px recon rec reconstruction out output dec decoder likelihood obs pred kl kld grad")
_MOMENTS: dict[str, str] = {
    "mean": BY_NAMES["mean_logvar"][0],
    **{spread: BY_NAMES[f"mean_{spread}"][1] for spread in ("logvar", "logstd", "var", "std")},
}
SAMPLE_NAME = re.compile(BY_NAMES["samples"][0].replace("|x|", "|"))


def words_of(name: str) -> tuple[str, ...]:
    """Return the words of an identifier or a logged name, in lower case: "KLLoss_1" and "kl-loss/1" alike."""
    name = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    name = re.sub(r"(?<=[a-zA-Z])(?=\d)", "_", name)
    return tuple(word for word in re.split(r"[^a-z0-9]+", name.lower()) if word)


def is_kl_name(name: str) -> bool:
    """Return whether a name suggests a KL, and not its weight or schedule."""
    words = words_of(name)
    named = bool(_KL_WORDS & set(words)) or any(phrase in "_".join(words) for phrase in _KL_PHRASES)
    return named and not _NO_KL_WORDS & set(words)


def moment_of(name: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the moments that a name suggests, "mean" or a kind of spread, each with the other words of the name."""
    found = []
    for split in (words_of(name), re.split(r"_+", name.lower())):  # sigma2: the second sigma, or a square
        core = "_".join(w for w in split if w in _MOMENT_WORDS)
        rest = tuple(w for w in split if w not in _MOMENT_WORDS)
        kind = next((kind for kind, pattern in _MOMENTS.items() if core and re.fullmatch(pattern, core)), None)
        if kind is not None:
            found.append((kind, rest))
    return list(dict.fromkeys(found))


def side_of(name: str) -> str:
    """Return whether a distribution or moment of that name is of "q" or "p"; "" if the name does not tell."""
    words = set(words_of(name))
    if words & _P_WORDS or re.fullmatch(BY_NAMES["distributions"][1], name.lower()):
        return "p"
    return "q" if words & _Q_WORDS or re.fullmatch(BY_NAMES["distributions"][0], name.lower()) else ""


def is_of_data(name: str) -> bool:
    """Return whether a name suggests the data or their reconstruction, and no latent."""
    return side_of(name) != "q" and bool(set(words_of(name)) & _DATA_WORDS)


def level_of(words: Iterable[str]) -> tuple[str, ...]:
    """Return the words of a name other than those for q, p and moments: the level of a hierarchy."""
    return tuple(w for w in words if w not in _Q_WORDS | _P_WORDS | _MOMENT_WORDS and w not in ("dist", "qs", "ps"))
