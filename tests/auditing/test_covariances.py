"""MultivariateNormals are asked about with full covariances."""

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from torch_klloss import audit
from torch_klloss.auditing.experiment.signatures import SIGNATURES


def diagonal(matrix):
    return matrix.diagonal(dim1=-2, dim2=-1)


def by_scale_tril(q, p, *, whole=True):
    a = torch.linalg.solve_triangular(p.scale_tril, q.scale_tril, upper=False)
    b = torch.linalg.solve_triangular(p.scale_tril, (p.loc - q.loc)[..., None], upper=False)[..., 0]
    logs = [diagonal(d.scale_tril).log().sum(-1) for d in (p, q)]
    trace = a.square().sum((-2, -1)) if whole else diagonal(a).square().sum(-1)
    return logs[0] - logs[1] + 0.5 * (trace + b.square().sum(-1) - b.shape[-1])


def by_covariance(q, p, *, whole=True):
    inverse, shift = p.precision_matrix, (p.loc - q.loc)[..., None]
    trace = diagonal(inverse @ q.covariance_matrix if whole else inverse * q.covariance_matrix).sum(-1)
    logs = p.covariance_matrix.logdet() - q.covariance_matrix.logdet()
    return 0.5 * (logs + trace + (shift.mT @ inverse @ shift)[..., 0, 0] - q.loc.shape[-1])


def test_the_kl_is_that_of_the_probes_before_the_map():
    layout, leaves = SIGNATURES["multivariate"].draw(3, rank=2)
    one = {name: layout.split(leaf)[0] for name, leaf in leaves.items()}
    q, p = SIGNATURES["multivariate"].arguments(one)
    expected = kl_divergence(*(Normal(one[f"{side}.mean"], one[f"{side}.std"]) for side in "qp")).sum(-1)
    torch.testing.assert_close(kl_divergence(q, p), expected)
    off = q.covariance_matrix - torch.diag_embed(q.variance)
    assert float(off.abs().mean()) > 0.02
    assert not torch.allclose(q.covariance_matrix[0], q.covariance_matrix[1])


@pytest.mark.parametrize("kl", [by_scale_tril, by_covariance, lambda q, p: kl_divergence(q, p).mean()])
def test_right_losses_of_full_covariances_are_right(kl):
    report = audit(kl, signature="multivariate")
    assert report.ok, report


@pytest.mark.parametrize(
    ("kl", "id"),
    [
        (lambda q, p: by_scale_tril(q, p, whole=False), "trace-of-diagonals"),
        (lambda q, p: by_covariance(q, p, whole=False), "unknown"),
        (
            lambda q, p: kl_divergence(Normal(q.mean, q.stddev), Normal(p.mean, p.stddev)).sum(-1).mean(),
            "covariances-ignored",
        ),
        (
            lambda q, p: kl_divergence(
                q, MultivariateNormal(torch.zeros_like(q.mean), torch.eye(q.mean.shape[-1], dtype=q.mean.dtype))
            ).mean(),
            "prior-ignored",
        ),
        (lambda q, p: kl_divergence(p, q).mean(), "swapped"),
        (lambda q, p: by_scale_tril(q, MultivariateNormal(p.loc, scale_tril=p.scale_tril.mT.tril())), "unknown"),
    ],
)
def test_what_is_wrong_off_the_diagonal_is_found(kl, id):
    report = audit(kl, signature="multivariate")
    assert not report.ok
    assert report.mistakes[0].id == id, report
