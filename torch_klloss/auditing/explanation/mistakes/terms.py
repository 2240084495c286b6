"""Mistakes in the closed form of two Normals: a term lost, doubled, or with the wrong sign."""

from collections.abc import Callable

from torch import Tensor

from torch_klloss.auditing.experiment.probes import Normals
from torch_klloss.auditing.experiment.signatures import SIGNATURES
from torch_klloss.auditing.explanation.expectations import TERMS
from torch_klloss.auditing.explanation.mistake import Mistake

Term = Callable[[Normals], Tensor]
_ANY_P = frozenset({"distributions", "independent", *(name for name in SIGNATURES if name.startswith("means_"))})
_STANDARD_P = frozenset(name for name in SIGNATURES if name.startswith("mean_"))


def _times(term: str, factor: float) -> dict[str, Term]:
    return {term: lambda n: factor * TERMS[term](n)}


_FORM = "The KL to the standard Normal is ½ (μ² + σ² - 1 - log σ²), summed over the latent dimensions."
_GENERAL = "The KL of two Normals is log(σp/σq) + (σq² + (μq - μp)²) / (2 σp²) - ½, summed over the latent dimensions."


def _term(
    id: str, what: str, wrong: str, parts: dict[str, Term], signature: str = "mean_logvar", *, is_multiple: bool = False
) -> Mistake:
    sampled = parts if id.startswith("log-term") else None  # log σ is a term of log q(x) too
    only = _ANY_P if signature == "distributions" else _STANDARD_P if "log" in parts and not sampled else None
    if only is None and not is_multiple:
        only = frozenset(SIGNATURES) - {"multivariate"}
    fix = _GENERAL if signature == "distributions" else _FORM
    return Mistake(id, what, fix, signature, wrong, analytic=parts, sampled=sampled, only=only)


def _scaled(id: str, factor: float, what: str, wrong: str) -> Mistake:
    """Return the mistake of a term, the first word of `id`, times a factor."""
    term = id.split("-")[0]
    words = "log σ" if term == "log" else f"the {term}"
    return _term(id, f"its term with {words} {what}", wrong, _times(term, factor), is_multiple=True)


MISTAKES = (
    _scaled("log-term-sign", -1.0, "has the wrong sign", "0.5 * (mean**2 + logvar.exp() - 1 + logvar).sum(-1).mean()"),
    _scaled("log-term-missing", 0.0, "is missing", "0.5 * (mean**2 + logvar.exp() - 1).sum(-1).mean()"),
    _scaled(
        "log-term-doubled",
        2.0,
        "is twice as large as it should be: log σ² in place of log σ",
        "(0.5 * (mean**2 + logvar.exp() - 1) - logvar).sum(-1).mean()",
    ),
    _scaled(
        "log-term-halved",
        0.5,
        "is half as large as it should be: log σ in place of log σ²",
        "0.5 * (mean**2 + logvar.exp() - 1 - 0.5 * logvar).sum(-1).mean()",
    ),
    _scaled(
        "mean-term-sign", -1.0, "has the wrong sign", "-0.5 * (1 + logvar + mean**2 - logvar.exp()).sum(-1).mean()"
    ),
    _scaled(
        "mean-term-missing", 0.0, "is missing", "-0.5 * (1 + logvar - logvar.exp()).sum(-1).mean() + 0 * mean.sum()"
    ),
    _scaled(
        "mean-term-doubled", 2.0, "lacks the factor ½", "(mean**2 + 0.5 * (logvar.exp() - 1 - logvar)).sum(-1).mean()"
    ),
    _term(
        "mean-not-squared",
        "it does not square the mean",
        "-0.5 * (1 + logvar - mean - logvar.exp()).sum(-1).mean()",
        {"mean": lambda n: 0.5 * (n.q_mean - n.p_mean) / n.p_var},
    ),
    _scaled(
        "variance-term-sign", -1.0, "has the wrong sign", "-0.5 * (1 + logvar - mean**2 + logvar.exp()).sum(-1).mean()"
    ),
    _scaled("variance-term-missing", 0.0, "is missing", "-0.5 * (1 + logvar - mean**2).sum(-1).mean()"),
    _scaled(
        "variance-term-doubled",
        2.0,
        "lacks the factor ½",
        "(logvar.exp() + 0.5 * (mean**2 - 1 - logvar)).sum(-1).mean()",
    ),
    _term(
        "std-for-variance",
        "it has σ in place of σ², in the term with the variance",
        "-0.5 * (1 + logvar - mean**2 - (0.5 * logvar).exp()).sum(-1).mean()",
        {"variance": lambda n: 0.5 * (0.5 * n.q_logvar).exp() / n.p_var},
    ),
    _term(
        "variance-squared",
        "it squares the variance",
        "-0.5 * (1 + logvar - mean**2 - logvar.exp() ** 2).sum(-1).mean()",
        {"variance": lambda n: 0.5 * n.q_var.square() / n.p_var},
    ),
    _term(
        "exp-missing",
        "it has log σ² in place of σ²: an exp is missing",
        "-0.5 * (1 + logvar - mean**2 - logvar).sum(-1).mean()",
        {"variance": lambda n: 0.5 * n.q_logvar / n.p_var},
    ),
    _term(
        "log-missing",
        "it has σ² in place of log σ²: a log is missing",
        "-0.5 * (1 + logvar.exp() - mean**2 - logvar.exp()).sum(-1).mean()",
        {"log": lambda n: -0.5 * n.q_var},
    ),
    _term(
        "log-of-std-missing",
        "it has σ in place of log σ: a log is missing",
        "0.5 * (mean**2 + std**2 - 1 - 2 * std).sum(-1).mean()",
        {"log": lambda n: -(0.5 * n.q_logvar).exp()},
        signature="mean_std",
    ),
    _term(
        "constant-missing",
        "it lacks the constant -½ of every dimension, so that it is not zero at q = p",
        "-0.5 * (logvar - mean**2 - logvar.exp()).sum(-1).mean()",
        _times("constant", 0.0),
    ),
    _term(
        "constant-sign",
        "its constant has the wrong sign, so that it is too large by one for every dimension",
        "-0.5 * (-1 + logvar - mean**2 - logvar.exp()).sum(-1).mean()",
        _times("constant", -1.0),
    ),
    _term(
        "constant-doubled",
        "its constant is twice as large as it should be: -1 for -½ in every dimension",
        "(0.5 * (mean**2 + logvar.exp() - logvar) - 1).sum(-1).mean()",
        _times("constant", 2.0),
    ),
    _term(
        "scale-of-p-not-squared",
        "it divides by 2σp in place of 2σp²",
        "((p.scale / q.scale).log() + (q.scale**2 + (q.loc - p.loc) ** 2) / (2 * p.scale) - 0.5).sum(-1).mean()",
        {
            "mean": lambda n: 0.5 * (n.q_mean - n.p_mean).square() / (0.5 * n.p_logvar).exp(),
            "variance": lambda n: 0.5 * n.q_var / (0.5 * n.p_logvar).exp(),
        },
        signature="distributions",
    ),
    _term(
        "variance-of-p-missing",
        "it does not divide by p's variance",
        "((p.scale / q.scale).log() + (q.scale**2 + (q.loc - p.loc) ** 2) / 2 - 0.5).sum(-1).mean()",
        {
            "mean": lambda n: 0.5 * (n.q_mean - n.p_mean).square(),
            "variance": lambda n: 0.5 * n.q_var,
        },
        signature="distributions",
    ),
    _term(
        "precedence",
        "it multiplies by p's variance where it should divide: `/ 2 * var` is not `/ (2 * var)`",
        "((p.scale / q.scale).log() + (q.scale**2 + (q.loc - p.loc) ** 2) / 2 * p.scale**2 - 0.5).sum(-1).mean()",
        {
            "mean": lambda n: 0.5 * (n.q_mean - n.p_mean).square() * n.p_var,
            "variance": lambda n: 0.5 * n.q_var * n.p_var,
        },
        signature="distributions",
    ),
    _term(
        "misplaced-parenthesis",
        "it divides the mean's square alone by 2σp², and leaves σq² as it is",
        "((p.scale / q.scale).log() + q.scale**2 + (q.loc - p.loc) ** 2 / (2 * p.scale**2) - 0.5).sum(-1).mean()",
        {"variance": lambda n: n.q_var},
        signature="distributions",
    ),
)
