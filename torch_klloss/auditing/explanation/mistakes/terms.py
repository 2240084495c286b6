"""Mistakes in the closed form of two Normals: a term lost, doubled, or with the wrong sign."""

from collections.abc import Callable

from torch import Tensor

from torch_klloss.auditing.experiment.probes import Normals
from torch_klloss.auditing.explanation.expectations import TERMS
from torch_klloss.auditing.explanation.mistake import Mistake

Term = Callable[[Normals], Tensor]
_ANY_P = frozenset({"distributions", "independent", "multivariate"})
_STANDARD_P = frozenset({"mean_logvar", "mean_std", "mean_logstd", "mean_var"})


def _times(term: str, factor: float) -> dict[str, Term]:
    return {term: lambda n: factor * TERMS[term](n)}


def _term(id: str, what: str, fix: str, wrong: str, parts: dict[str, Term], signature: str = "mean_logvar") -> Mistake:
    linear = id.startswith("log-term")  # the logarithm of the scale is a term of log q(x) too
    sampled = parts if linear else None
    only = _ANY_P if signature == "distributions" else None if "log" not in parts or sampled else _STANDARD_P
    return Mistake(id, what, fix, signature, wrong, analytic=parts, sampled=sampled, only=only)


_FORM = "The KL to the standard Normal is ½ (μ² + σ² - 1 - log σ²), summed over the latent dimensions."
_GENERAL = "The KL of two Normals is log(σp/σq) + (σq² + (μq - μp)²) / (2 σp²) - ½, summed over the latent dimensions."

MISTAKES = (
    _term(
        "log-term-sign",
        "its term with log σ has the wrong sign",
        _FORM,
        "0.5 * (mean**2 + logvar.exp() - 1 + logvar).sum(-1).mean()",
        _times("log", -1.0),
    ),
    _term(
        "log-term-missing",
        "its term with log σ is missing",
        _FORM,
        "0.5 * (mean**2 + logvar.exp() - 1).sum(-1).mean()",
        _times("log", 0.0),
    ),
    _term(
        "log-term-doubled",
        "its term with log σ is twice as large as it should be: log σ² in place of log σ",
        _FORM,
        "(0.5 * (mean**2 + logvar.exp() - 1) - logvar).sum(-1).mean()",
        _times("log", 2.0),
    ),
    _term(
        "log-term-halved",
        "its term with log σ is half as large as it should be: log σ in place of log σ²",
        _FORM,
        "0.5 * (mean**2 + logvar.exp() - 1 - 0.5 * logvar).sum(-1).mean()",
        _times("log", 0.5),
    ),
    _term(
        "mean-term-sign",
        "its term with the mean has the wrong sign",
        _FORM,
        "-0.5 * (1 + logvar + mean**2 - logvar.exp()).sum(-1).mean()",
        _times("mean", -1.0),
    ),
    _term(
        "mean-term-missing",
        "its term with the mean is missing",
        _FORM,
        "-0.5 * (1 + logvar - logvar.exp()).sum(-1).mean() + 0 * mean.sum()",
        _times("mean", 0.0),
    ),
    _term(
        "mean-term-doubled",
        "its term with the mean lacks the factor ½",
        _FORM,
        "(mean**2 + 0.5 * (logvar.exp() - 1 - logvar)).sum(-1).mean()",
        _times("mean", 2.0),
    ),
    _term(
        "mean-not-squared",
        "it does not square the mean",
        _FORM,
        "-0.5 * (1 + logvar - mean - logvar.exp()).sum(-1).mean()",
        {"mean": lambda n: 0.5 * (n.q_mean - n.p_mean) / n.p_var},
    ),
    _term(
        "variance-term-sign",
        "its term with the variance has the wrong sign",
        _FORM,
        "-0.5 * (1 + logvar - mean**2 + logvar.exp()).sum(-1).mean()",
        _times("variance", -1.0),
    ),
    _term(
        "variance-term-missing",
        "its term with the variance is missing",
        _FORM,
        "-0.5 * (1 + logvar - mean**2).sum(-1).mean()",
        _times("variance", 0.0),
    ),
    _term(
        "variance-term-doubled",
        "its term with the variance lacks the factor ½",
        _FORM,
        "(logvar.exp() + 0.5 * (mean**2 - 1 - logvar)).sum(-1).mean()",
        _times("variance", 2.0),
    ),
    _term(
        "std-for-variance",
        "it has σ in place of σ², in the term with the variance",
        _FORM,
        "-0.5 * (1 + logvar - mean**2 - (0.5 * logvar).exp()).sum(-1).mean()",
        {"variance": lambda n: 0.5 * (0.5 * n.q_logvar).exp() / n.p_var},
    ),
    _term(
        "variance-squared",
        "it squares the variance",
        _FORM,
        "-0.5 * (1 + logvar - mean**2 - logvar.exp() ** 2).sum(-1).mean()",
        {"variance": lambda n: 0.5 * n.q_var.square() / n.p_var},
    ),
    _term(
        "exp-missing",
        "it has log σ² in place of σ²: an exp is missing",
        _FORM,
        "-0.5 * (1 + logvar - mean**2 - logvar).sum(-1).mean()",
        {"variance": lambda n: 0.5 * n.q_logvar / n.p_var},
    ),
    _term(
        "log-missing",
        "it has σ² in place of log σ²: a log is missing",
        _FORM,
        "-0.5 * (1 + logvar.exp() - mean**2 - logvar.exp()).sum(-1).mean()",
        {"log": lambda n: -0.5 * n.q_var},
    ),
    _term(
        "log-of-std-missing",
        "it has σ in place of log σ: a log is missing",
        _FORM,
        "0.5 * (mean**2 + std**2 - 1 - 2 * std).sum(-1).mean()",
        {"log": lambda n: -(0.5 * n.q_logvar).exp()},
        signature="mean_std",
    ),
    _term(
        "constant-missing",
        "it lacks the constant -½ of every dimension, so that it is not zero at q = p",
        _FORM,
        "-0.5 * (logvar - mean**2 - logvar.exp()).sum(-1).mean()",
        _times("constant", 0.0),
    ),
    _term(
        "constant-sign",
        "its constant has the wrong sign, so that it is too large by one for every dimension",
        _FORM,
        "-0.5 * (-1 + logvar - mean**2 - logvar.exp()).sum(-1).mean()",
        _times("constant", -1.0),
    ),
    _term(
        "constant-doubled",
        "its constant is twice as large as it should be: -1 for -½ in every dimension",
        _FORM,
        "(0.5 * (mean**2 + logvar.exp() - logvar) - 1).sum(-1).mean()",
        _times("constant", 2.0),
    ),
    _term(
        "scale-of-p-not-squared",
        "it divides by 2σp in place of 2σp²",
        _GENERAL,
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
        _GENERAL,
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
        _GENERAL,
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
        _GENERAL,
        "((p.scale / q.scale).log() + q.scale**2 + (q.loc - p.loc) ** 2 / (2 * p.scale**2) - 0.5).sum(-1).mean()",
        {"variance": lambda n: n.q_var},
        signature="distributions",
    ),
)
