"""Mistakes with the direction: another divergence of the same two distributions."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from torch_klloss.auditing.experiment.probes import Categoricals, MixedNormals, Normals
from torch_klloss.auditing.experiment.signatures import SIGNATURES
from torch_klloss.auditing.explanation.expectations import REVERSE, TERMS
from torch_klloss.auditing.explanation.mistake import Mistake

_BOTH = ((1.0, False), (1.0, True))


_DIAGONAL = frozenset({"distributions", "independent", *(name for name in SIGNATURES if name.startswith("means_"))})


_TWO_CATEGORICALS = frozenset(
    name for name, signature in SIGNATURES.items() if signature.categorical and not signature.standard
)


def _marginals(n: MixedNormals) -> Normals:
    return n.marginals


def _trace_of_diagonals(n: Normals) -> Tensor:
    if not isinstance(n, MixedNormals):  # together with a mistake that leaves no covariances
        return TERMS["variance"](n)
    q, p = n.cholesky_diagonals
    return 0.5 * (q / p).square()


def _with_standard_p(n: Normals) -> Normals:
    if isinstance(n, MixedNormals):
        return n.against_standard
    return replace(n, p_mean=0 * n.p_mean, p_logvar=0 * n.p_logvar)


def _with_variances_for_scales(n: Normals) -> Normals:
    return replace(n, q_logvar=2 * n.q_logvar, p_logvar=2 * n.p_logvar)


def _log_mixture(c: Categoricals) -> Tensor:
    return torch.logaddexp(c.log_q, c.log_p) - math.log(2)


MISTAKES = (
    Mistake(
        id="swapped",
        what="it is KL(p‖q), the KL in the other direction",
        fix="Exchange q and p; torch's kl_divergence takes the distribution of the expectation first, "
        "F.kl_div takes it second.",
        signature="distributions",
        wrong="kl_divergence(p, q).sum(-1).mean()",
        analytic={"direction": REVERSE},
        sampled={"direction": REVERSE},
        categorical={"direction": REVERSE},
    ),
    Mistake(
        id="symmetrised",
        what="it is the sum of the KLs in both directions",
        fix="Leave out KL(p‖q), or say that the divergence is Jeffreys'.",
        signature="distributions",
        wrong="(kl_divergence(q, p) + kl_divergence(p, q)).sum(-1).mean()",
        analytic={"direction": _BOTH},
        sampled={"direction": _BOTH},
        categorical={"direction": _BOTH},
    ),
    Mistake(
        id="prior-ignored",
        what="it compares q with the standard Normal, whatever p is",
        fix="Use p's mean and scale.",
        signature="distributions",
        wrong="0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum(-1).mean()",
        analytic={"pair": _with_standard_p},
        sampled={"pair": _with_standard_p},
        only=_DIAGONAL | {"multivariate"},
    ),
    Mistake(
        id="variances-as-scales",
        what="it takes the variances of q and p for standard deviations",
        fix="Normal takes a standard deviation: Normal(mean, variance.sqrt()).",
        signature="distributions",
        wrong="kl_divergence(torch.distributions.Normal(q.mean, q.variance), "
        "torch.distributions.Normal(p.mean, p.variance)).sum(-1).mean()",
        analytic={"pair": _with_variances_for_scales},
        only=_DIAGONAL,
    ),
    Mistake(
        id="covariances-ignored",
        what="it compares the single dimensions, and ignores what the covariances have off their diagonals",
        fix="Take the whole covariance matrices: the trace, the square and the determinants of the KL need them.",
        signature="multivariate",
        wrong="kl_divergence(torch.distributions.Normal(q.mean, q.stddev), "
        "torch.distributions.Normal(p.mean, p.stddev)).sum(-1).mean()",
        analytic={"pair": _marginals},
        only=frozenset({"multivariate"}),
    ),
    Mistake(
        id="trace-of-diagonals",
        what="its trace has the diagonals of the Cholesky factors alone: tr(Σp⁻¹ Σq) is the sum of all squares in "
        "Lp⁻¹ Lq",
        fix="Sum the squares of the whole matrix Lp⁻¹ Lq.",
        signature="multivariate",
        wrong="kl_divergence(q, p).mean() + 0.5 * ("
        "(q.scale_tril.diagonal(dim1=-2, dim2=-1) / p.scale_tril.diagonal(dim1=-2, dim2=-1)).square().sum(-1) "
        "- torch.linalg.solve_triangular(p.scale_tril, q.scale_tril, upper=False).square().sum((-2, -1))).mean()",
        analytic={"variance": _trace_of_diagonals},
        only=frozenset({"multivariate"}),
    ),
    Mistake(
        id="uniform-for-p",
        what="it compares q with the uniform distribution, whatever p is",
        fix="Use p's log-probabilities.",
        signature="logits",
        wrong="(logits_q.softmax(-1) * (logits_q.log_softmax(-1) + math.log(logits_q.shape[-1]))).sum(-1).mean() "
        "+ 0 * logits_p.sum()",
        categorical={"log p": lambda c: c.uniform},
        only=_TWO_CATEGORICALS,
    ),
    Mistake(
        id="uniform-for-q",
        what="it compares the uniform distribution with p, whatever q is",
        fix="Use q's probabilities.",
        signature="logits",
        wrong="-(logits_p.log_softmax(-1) + math.log(logits_p.shape[-1])).mean() + 0 * logits_q.sum()",
        categorical={"log q": lambda c: c.uniform, "weight": lambda c: c.uniform.exp()},
        only=_TWO_CATEGORICALS,
    ),
    Mistake(
        id="jensen-shannon",
        what="it is the Jensen-Shannon divergence, half the KLs of q and p to their mixture",
        fix="Compare q with p and not with their mixture, or say that the divergence is Jensen's and Shannon's.",
        signature="logits",
        wrong="0.5 * sum((w * (w.log() - (0.5 * (logits_q.softmax(-1) + logits_p.softmax(-1))).log())).sum(-1).mean() "
        "for w in (logits_q.softmax(-1), logits_p.softmax(-1)))",
        categorical={"direction": ((0.5, False), (0.5, True)), "log p": _log_mixture},
    ),
)
