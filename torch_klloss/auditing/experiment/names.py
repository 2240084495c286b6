"""The roles that the names of parameters and variables suggest: mean, spread, log-probability, q, p."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_MEAN = r"(?:.*_)?(?:mu|mean|means|m|loc|mus)(?:_?[qz])?(?:_.*)?"
_Q = r"(?:q|posterior|q_?dist|dist_?q|q_z|qz|q_?zx|qz_?x|post|teacher|target_dist|guide)"
_P = r"(?:p|prior|p_?dist|dist_?p|p_z|pz|student|model)"
BY_NAMES: Mapping[str, tuple[str, ...]] = {
    "samples": (r"z|z_?s|x|sample|samples|latent|latents", _MEAN, r"(?:.*_)?(?:log_?var.*|lv|log_?sigma_?(?:2|sq.*))"),
    "mean_logvar": (_MEAN, r"(?:.*_)?(?:log_?var.*|lv|log_?sigma_?(?:2|sq.*)|log_?std_?(?:2|sq.*)|log_?s2)(?:_?[qz])?"),
    "mean_logstd": (_MEAN, r"(?:.*_)?(?:log_?(?:std|sigma|scale|sd|stddev)s?|ls|lsigma|rho)(?:_?[qz])?"),
    "mean_var": (_MEAN, r"(?:.*_)?(?:var|variance|sigma_?(?:2|sq.*)|std_?(?:2|sq.*)|v)(?:_?[qz])?"),
    "mean_std": (_MEAN, r"(?!.*(?:raw|pre)_)(?:.*_)?(?:std|sigma|scale|sd|stddev|s|stds|sigmas|std_?dev)(?:_?[qz])?"),
    "mean_rho": (
        _MEAN,
        r"(?:.*_)?(?:rho|(?:raw|pre)_?(?:std|sigma|scale)|(?:std|sigma|scale)_?(?:raw|pre))(?:_?[qz])?",
    ),
    "log_probs": (
        r"log_?(?:prob|p(?=rob))?s?_?q.*|lq|logqx?|q_?log_?probs?",
        r"log_?(?:prob)?s?_?p(?!rob).*|lp|logpx?|p_?log_?probs?",
    ),
    "logits": (
        r"(?:q_?|teacher_?|target_?|t_?)logits|logits_?(?:q|t|teacher|target)|q_?scores|scores_?q",
        r"(?:p_?|student_?|input_?|s_?)logits|logits_?(?:p|s|student|input)|p_?scores|scores_?p",
    ),
    "kl_div": (r"inputs?|log_?input|log_?p(?:rob)?s?|student_?log_?probs?", r"targets?|target_?probs?|teacher_?probs?"),
    "kl_div_log_target": (r"inputs?|log_?input", r"log_?targets?|targets?_?log(?:_?probs?)?"),
    "distributions": (_Q, _P),
    "uniform_logits": (r"(?:.*_)?(?:logits?|scores)(?:_.*)?",),
    "uniform_log_probs": (r"(?:.*_)?log_?(?:probs?|p|q|softmax)(?:_?q?y)?|log_?q_?y",),
    "uniform_probs": (r"(?:.*_)?(?:probs?|probabilities|softmax|q_?y|weights|assignments?|usage)(?:_.*)?",),
}
"""Patterns of parameter names, by signature and role."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


MOMENT_WORDS = _set(
    "mu mus mean means m loc log var vars logvar logvars variance lv sigma sigmas std stds logstd logsigma logscale "
    "scale sd stddev dev rho raw pre lsigma ls sq squared square s v sigma2 std2"
)
Q_WORDS = _set("q posterior post enc encoder qz z zx inference approx guide variational latent")
P_WORDS = _set("p prior pz pri")
_MOMENTS: dict[str, str] = {
    "mean": BY_NAMES["mean_logvar"][0],
    **{spread: BY_NAMES[f"mean_{spread}"][1] for spread in ("logvar", "logstd", "var", "std", "rho")},
}


def words_of(name: str) -> tuple[str, ...]:
    """Return the words of an identifier or a logged name, in lower case: "KLLoss_1" and "kl-loss/1" alike."""
    name = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    name = re.sub(r"(?<=[a-zA-Z])(?=\d)", "_", name)
    return tuple(word for word in re.split(r"[^a-z0-9]+", name.lower()) if word)


def moment_of(name: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the moments that a name suggests, "mean" or a kind of spread, each with the other words of the name."""
    found = []
    for split in (words_of(name), re.split(r"_+", name.lower())):  # sigma2: the second sigma, or a square
        core = "_".join(w for w in split if w in MOMENT_WORDS)
        rest = tuple(w for w in split if w not in MOMENT_WORDS)
        kinds = (kind for kind, pattern in _MOMENTS.items() if core and re.fullmatch(pattern, core))
        found += [(kind, rest) for kind in kinds]
    return list(dict.fromkeys(found))


# --- the policies of reinforcement learning ---------------------------------------------------------------------------

_BATCHES = _set("b mb")  # as prefixes: what was stored while acting
_BEHAVIOUR = _set("old prev previous behavior behaviour rollout rollouts buffer stored sampling sampled collected")
_CURRENT = _set("new now updated current curr cur policy pi pis model actor online target student")
_REFERENCE = _set("ref reference sft base frozen init initial pretrained anchor prior teacher")
_STANDINGS = ((4, Q_WORDS - {"z", "latent"}), (0, P_WORDS - {"prior", "pri"}), (3, _BEHAVIOUR), (1, _REFERENCE))
_LOG_PROB = re.compile(
    r"(?P<before>[a-z]*?)log_?(?:prob(?:abilitie)?s?|p(?:s|robs?)?|density|densities|likelihoods?)?(?P<after>_?pi)?"
)
_KINDS: Mapping[str, frozenset[str]] = {
    "logits": _set("logits logit scores"),
    "distributions": _set("dist dists distribution distributions d policy pi"),
}
_NEUTRAL = _set("per token tokens action actions act a all batch seq sequence step mean selected chosen the s log prob")


def standing_of(words: Sequence[str]) -> int:
    """Return how surely words name the distribution of the draws: the higher of two is q.

    Actions come from the old or behaviour policy, which a new one is compared with; tokens come from the policy, which
    is compared with a reference.
    """
    found = next((standing for standing, known in _STANDINGS if known & set(words)), 2)
    return 3 if found == 2 and set(words[:1]) & _BATCHES else found


def log_prob_words(name: str) -> tuple[str, ...] | None:
    """Return the other words of the name of log-probabilities, as ("old",) of "oldlogprobs"; None of another name."""
    words = words_of(name)
    found: list[str] = []
    is_log_prob = False
    for index, word in enumerate(words):
        if index and word in _BATCHES:
            continue  # log_prob_b is that of b
        match = _LOG_PROB.fullmatch(word)
        is_log_prob |= match is not None
        found += [word] if match is None else [part for part in match.groups() if part]
    return tuple(word for word in found if word not in ("prob", "probs", "ps")) if is_log_prob else None


def words_of_kind(name: str, kind: str) -> tuple[str, ...] | None:
    """Return the other words of the name of a distribution or of its logits; None of a name that is neither."""
    words = words_of(name)
    policies = _BEHAVIOUR | _CURRENT | _REFERENCE
    saying = _KINDS[kind] if kind == "logits" else _KINDS[kind] | policies
    if not set(words) <= policies | _BATCHES | _KINDS[kind] | _NEUTRAL or not saying & set(words):
        return None
    return tuple(word for word in words if word not in _KINDS[kind] - {"policy", "pi"})
