"""Diagonal covariances against full and low-rank ones, without a matrix for the diagonal one."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    FisherSnedecor,
    GeneralizedPareto,
    Independent,
    InverseGamma,
    Laplace,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    Pareto,
    StudentT,
    TransformedDistribution,
)

from tests.closed_forms.checks import DTYPES
from tests.families import gaussians
from torch_klloss import diagonal_normal, has_closed_form, kl_divergence
from torch_klloss.methods import ClosedForm

DIM, RANK = 6, 2


def spread(batch: tuple[int, ...], *event: int) -> Tensor:
    return torch.randn(*batch, *event, dtype=torch.float64)


def diagonal(loc: Tensor, log_scale: Tensor, factor: Tensor) -> Independent:
    return Independent(Normal(loc, log_scale.exp()), 1)


def from_log_variance(loc: Tensor, log_scale: Tensor, factor: Tensor) -> Independent:
    return diagonal_normal(loc, 2 * log_scale, batch_dims=loc.dim() - 1)


def full(loc: Tensor, log_scale: Tensor, factor: Tensor) -> MultivariateNormal:
    return MultivariateNormal(loc, scale_tril=torch.diag_embed(log_scale.exp()) + factor.tril(-1))


def low_rank(loc: Tensor, log_scale: Tensor, factor: Tensor) -> LowRankMultivariateNormal:
    return LowRankMultivariateNormal(loc, factor[..., :RANK], (2 * log_scale).exp())


DIAGONAL: dict[str, Callable] = {"diagonal": diagonal, "log-variance": from_log_variance}
DENSE: dict[str, Callable] = {"full": full, "low rank": low_rank}
ORDERS = [(q, p) for a, b in ((DIAGONAL, DENSE), (DENSE, DIAGONAL)) for q, p in itertools.product(a.items(), b.items())]
every_order = pytest.mark.parametrize(
    ("q_of", "p_of"), [(q[1], p[1]) for q, p in ORDERS], ids=[f"{q[0]}-{p[0]}" for q, p in ORDERS]
)


def parameters(batch: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    drawn = spread(batch, DIM), 0.5 * spread(batch, DIM), 0.5 * spread(batch, DIM, DIM)
    return [t.to(dtype).requires_grad_() for t in drawn]


def covariance_of(d) -> Tensor:
    return d.covariance_matrix if hasattr(d, "covariance_matrix") else torch.diag_embed(d.variance)


class Moments:
    """A Gaussian as its mean and covariance, all that the reference needs."""

    def __init__(self, d):
        self.loc, self.covariance_matrix, self.event_shape = d.mean, covariance_of(d), d.event_shape


@every_order
@pytest.mark.parametrize(("q_batch", "p_batch"), [((), ()), ((4,), ()), ((), (4,)), ((2, 1), (3,)), ((3,), (2, 1))])
def test_value_and_gradient_are_those_of_the_covariances(q_of, p_of, q_batch, p_batch):
    torch.manual_seed(0)
    of_q, of_p = parameters(q_batch), parameters(p_batch)
    q, p = q_of(*of_q), p_of(*of_p)
    value, expected = kl_divergence(q, p), gaussians(Moments(q), Moments(p)).value
    assert value.shape == torch.broadcast_shapes(q_batch, p_batch)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    found, wanted = (
        torch.autograd.grad(kl.sum(), of_q + of_p, allow_unused=True, retain_graph=True) for kl in (value, expected)
    )
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@DTYPES
@every_order
def test_equal_distributions_have_a_kl_of_exactly_zero(q_of, p_of, dtype):
    torch.manual_seed(0)
    loc = torch.randn(5, DIM).to(dtype)
    scales = torch.exp2(torch.randint(-3, 4, (5, DIM))).to(dtype)  # whose squares, logarithms and roots do not round
    same = [of(loc, scales.log(), torch.zeros(5, DIM, DIM, dtype=dtype)) for of in (q_of, p_of)]
    exact = []
    for d in same:
        if isinstance(d, Independent):
            exact.append(Independent(Normal(loc, scales), 1))
        elif isinstance(d, MultivariateNormal):
            exact.append(MultivariateNormal(loc, scale_tril=torch.diag_embed(scales)))
        else:
            exact.append(LowRankMultivariateNormal(loc, d.cov_factor, scales.square()))
    assert kl_divergence(*exact).tolist() == [0.0] * 5


@DTYPES
@every_order
@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_near_equality_the_digits_and_the_sign_are_kept(q_of, p_of, dtype, distance):
    """Rounded parameters are as good as others: a perturbation of eps moves a KL by eps √KL, as of a distance."""
    torch.manual_seed(0)
    base = spread((20,), DIM), 0.5 * spread((20,), DIM), torch.zeros(20, DIM, DIM, dtype=torch.float64)

    def near() -> list[Tensor]:
        return [(t + distance * torch.randn_like(t)).to(dtype) for t in base]

    q, p = q_of(*near()), p_of(*near())
    value = kl_divergence(q, p)
    exact = kl_divergence(*(full_in_float64(d) for d in (q, p)))
    assert value.dtype == dtype
    assert (value > 0).all()
    eps = torch.finfo(torch.float64).eps
    allowed = 64 * (eps * exact.sqrt() + torch.finfo(dtype).eps * exact / 16)
    assert ((value.double() - exact).abs() <= allowed).all()
    swapped = kl_divergence(*(full_in_float64(d) for d in (p, q)))
    assert ((swapped - exact).abs() > allowed).any()


def full_in_float64(d) -> MultivariateNormal:
    """Return the same Gaussian with the factor that its parameters make, so that the full pair is the judge."""
    if isinstance(d, MultivariateNormal):
        return MultivariateNormal(d.loc.double(), scale_tril=d.scale_tril.double())
    if isinstance(d, Independent):
        base = d.base_dist
        scale = (base.logvar.double() / 2).exp() if hasattr(base, "logvar") else base.scale.double()
        return MultivariateNormal(base.loc.double(), scale_tril=torch.diag_embed(scale))
    root = torch.cat([torch.diag_embed(d.cov_diag.double().sqrt()), d.cov_factor.double().mT], -2)
    R = torch.linalg.qr(root).R
    return MultivariateNormal(d.loc.double(), scale_tril=R.mT * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))


@pytest.mark.parametrize("is_q", [True, False])
def test_nothing_of_d_by_d_is_made_beside_a_low_rank_covariance(is_q):
    d = 30_000  # of whose square a float64 matrix takes 7 GB
    low = LowRankMultivariateNormal(torch.zeros(d), torch.full((d, 3), 0.01), torch.ones(d))
    other = diagonal_normal(torch.zeros(d), torch.zeros(d), batch_dims=0)
    value = kl_divergence(low, other) if is_q else kl_divergence(other, low)
    assert 0 < value < torch.inf


def test_a_shared_covariance_is_not_copied_for_every_diagonal_one():
    q = Independent(Normal(torch.zeros(20_000, 64), 1.0), 1)
    p = MultivariateNormal(torch.zeros(64), torch.eye(64))  # 20 000 copies of it in float64 would take 655 MB
    with torch.profiler.profile(profile_memory=True) as profile:
        kl_divergence(q, p)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < 20_000 * 64 * 64 * 4


@pytest.mark.parametrize("dense_of", DENSE.values(), ids=DENSE)
def test_normals_are_told_from_what_they_are_not(dense_of):
    torch.manual_seed(0)
    p = dense_of(*(t.detach() for t in parameters(())))
    moved = TransformedDistribution(
        Independent(Normal(torch.zeros(DIM, dtype=torch.float64), 1.0), 1), [AffineTransform(1.0, 2.0)]
    )
    direct = Independent(Normal(torch.ones(DIM, dtype=torch.float64), 2.0), 1)
    student = Independent(StudentT(torch.full((DIM,), 4.0)), 1)
    assert not has_closed_form(p, student)
    with pytest.raises(NotImplementedError, match="No closed form is registered"):
        kl_divergence(p, student)
    assert torch.equal(kl_divergence(moved, p), kl_divergence(direct, p))
    assert torch.equal(kl_divergence(p, moved), kl_divergence(p, direct))
    assert ClosedForm().supports(direct, p)


@pytest.mark.parametrize("dense_of", DENSE.values(), ids=DENSE)
def test_independent_components_that_are_no_normals_go_by_their_moments(dense_of):
    """Beside a Gaussian p only the covariance of q counts; beside a Gaussian q only its marginals do."""
    torch.manual_seed(0)
    normal = dense_of(*(t.detach() for t in parameters(())))
    loc, b = torch.randn(DIM, dtype=torch.float64), torch.rand(DIM, dtype=torch.float64) + 0.5
    laplace = Independent(Laplace(loc, b), 1)
    inverse, gap = torch.linalg.inv(normal.covariance_matrix), loc - normal.loc
    quadratic = (inverse.diagonal() * 2 * b**2).sum() + gap @ inverse @ gap
    constant = DIM * math.log(2 * math.pi) + normal.covariance_matrix.logdet()
    forward = (quadratic + constant) / 2 - laplace.entropy()
    torch.testing.assert_close(kl_divergence(laplace, normal), forward, rtol=1e-9, atol=0)
    marginals = Normal(normal.loc, normal.covariance_matrix.diagonal().sqrt())
    cross_entropy = (kl_divergence(marginals, Laplace(loc, b)) + marginals.entropy()).sum()
    backward = cross_entropy - normal.entropy()
    torch.testing.assert_close(kl_divergence(normal, laplace), backward, rtol=1e-9, atol=0)


def _each(x):
    """Return six components, in two elements, of which the first's second one alone has the parameter x."""
    found = torch.full((2, DIM), 6.0, dtype=torch.float64)
    found[0, 1] = x
    return found


WITHOUT_A_VARIANCE = {
    "StudentT, no mean": StudentT(_each(0.9)),
    "StudentT": StudentT(_each(1.5)),
    "FisherSnedecor": FisherSnedecor(_each(6.0), _each(3.5)),
    "InverseGamma": InverseGamma(_each(1.5), _each(6.0)),
    "Pareto": Pareto(_each(6.0), _each(0.9)),
    "GeneralizedPareto": GeneralizedPareto(0 * _each(6.0), _each(6.0), _each(36.0) / 60),
}


@pytest.mark.parametrize("dense_of", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("components", WITHOUT_A_VARIANCE.values(), ids=WITHOUT_A_VARIANCE)
def test_components_without_a_variance_are_infinitely_far_from_a_gaussian(components, dense_of):
    p = dense_of(*(t.detach() for t in parameters(())))
    value = kl_divergence(Independent(components, 1), p)
    finite = components.variance.isfinite().all(-1)
    assert not finite[0]
    assert value.isinf().tolist() == (~finite).tolist()


def test_a_subclass_with_a_density_of_its_own_is_not_taken_for_a_normal():
    class Mine(Normal):
        def log_prob(self, value):
            return 2 * super().log_prob(value)

    q, p = Independent(Mine(torch.zeros(3), 1.0), 1), MultivariateNormal(torch.zeros(3), torch.eye(3))
    assert not has_closed_form(q, p)
    assert not ClosedForm().supports(q, p)
