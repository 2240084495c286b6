"""MultivariateNormal and LowRankMultivariateNormal: accuracy, exact zeros, one solve for a shared p."""

import itertools

import pytest
import torch
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal
from torch.distributions import kl_divergence as torch_kl

from tests.references.harness import combinations, draw, errors_at, measure
from tests.references.multivariate_normal import HALF_RANK, REFERENCES
from tests.references.targets import GRADIENT
from tests.references.worst_cases import used_by
from torch_klloss import kl_divergence

CASES = [
    pytest.param(*case, id=f"{case[0].name}-{case[1]}-{str(case[2]).removeprefix('torch.')}")
    for case in combinations([*REFERENCES, HALF_RANK])
]
SAME_TYPE = [reference for reference in REFERENCES if reference.type_q is reference.type_p]


def spd(*shape: int) -> torch.Tensor:
    root = torch.randn(*shape, shape[-1], dtype=torch.float64)
    return root @ root.mT + 0.1 * torch.eye(shape[-1], dtype=torch.float64)


def full(*batch: int, size: int = 3) -> MultivariateNormal:
    return MultivariateNormal(torch.randn(*batch, size, dtype=torch.float64), spd(*batch, size))


def low_rank(*batch: int, size: int = 3, rank: int = 2, scale: float = 1.0) -> LowRankMultivariateNormal:
    loc, diagonal = torch.randn(2, *batch, size, dtype=torch.float64)
    return LowRankMultivariateNormal(loc, scale * torch.randn(*batch, size, rank, dtype=torch.float64), diagonal.exp())


@pytest.mark.parametrize(("reference", "regime", "dtype"), CASES)
def test_values_and_gradients_have_the_digits_that_were_promised(reference, regime, dtype):
    accuracy = measure(reference, regime, dtype, num_draws=40)
    q, p = draw(reference, regime, dtype, 40)
    assert max(used_by(reference, accuracy.errors, q, p, "value")) <= 1, accuracy.worst_value_at
    assert accuracy.worst_gradient <= GRADIENT[dtype], accuracy.worst_gradient_at
    assert (accuracy.negatives, accuracy.not_finite, accuracy.not_zero) == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reference", SAME_TYPE, ids=lambda reference: reference.name)
def test_the_targets_reject_a_formula_that_cancels_near_equality(reference, dtype):
    q, p = draw(reference, "near", dtype, 40)
    errors = errors_at(reference, q, p, kl=torch_kl, with_gradient=False)
    assert sum(share > 1 for share in used_by(reference, errors, q, p, "value")) > 20


@pytest.mark.parametrize("key", ["covariance_matrix", "precision_matrix", "scale_tril"])
def test_the_kl_from_itself_is_zero_however_it_is_given(key):
    matrix = torch.linalg.cholesky(spd(4, 5))
    matrix = matrix if key == "scale_tril" else matrix @ matrix.mT
    q, p = (MultivariateNormal(torch.ones(5, dtype=torch.float64), **{key: matrix}) for _ in range(2))
    assert kl_divergence(q, p).tolist() == [0.0] * 4


@pytest.mark.parametrize("rank", [1, 3, 8], ids=lambda rank: f"rank {rank} of 4")
def test_an_ill_conditioned_low_rank_kl_from_itself_is_zero(rank):
    for scale in (1.0, 1e4, 1e7):
        q = low_rank(20, size=4, rank=rank, scale=scale)
        assert kl_divergence(q, q).tolist() == [0.0] * 20
    ours, theirs = (kl(q, q).abs().max() for kl in (kl_divergence, torch_kl))
    assert ours == 0 < theirs


def test_no_kl_of_ill_conditioned_low_rank_normals_is_negative():
    q = low_rank(50, size=4, rank=2, scale=1e7)
    rotation = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q  # the same distribution by other parameters
    p = LowRankMultivariateNormal(q.loc, q.cov_factor @ rotation, q.cov_diag)
    assert (kl_divergence(q, p) >= 0).all()
    assert (torch_kl(q, p) < 0).any()


def test_the_factor_of_a_covariance_is_used_and_not_multiplied_out():
    q, p = (MultivariateNormal(torch.zeros(3), scale_tril=torch.eye(3) * scale) for scale in (1.0, 2.0))
    kl_divergence(q, p)
    assert "covariance_matrix" not in vars(q) | vars(p)


def test_a_shared_p_is_solved_for_once(monkeypatch):
    solve, batches = torch.linalg.solve_triangular, []

    def spy(a, b, **options):
        batches.append(a.shape[:-2].numel())
        return solve(a, b, **options)

    monkeypatch.setattr(torch.linalg, "solve_triangular", spy)
    q = full(6, 5)
    for p, most in ((full(), 1), (full().expand((6, 5)), 1), (full(1, 5), 5), (full(6, 5), 30)):
        batches.clear()
        ours = kl_divergence(q, p)
        assert max(batches) == most
        torch.testing.assert_close(ours, torch_kl(q, p))


def test_low_rank_normals_are_not_made_dense():
    q, p = low_rank(size=30_000), low_rank(size=30_000, rank=1)  # a matrix of this size has seven gigabytes
    torch.testing.assert_close(kl_divergence(q, p), torch_kl(q, p))


def test_beyond_32_dimensions_float32_stays_within_its_condition_number():
    q, p = (
        MultivariateNormal(d.loc.float(), scale_tril=d.scale_tril.float()) for d in (full(8, size=40), full(size=40))
    )
    exact = kl_divergence(*(MultivariateNormal(d.loc.double(), scale_tril=d.scale_tril.double()) for d in (q, p)))
    error = (kl_divergence(q, p).double() - exact).abs() / exact
    assert (error <= 16 * torch.linalg.cond(p.scale_tril.double()) * torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize(("q", "p"), list(itertools.product((full, low_rank), repeat=2)))
def test_second_derivatives_are_those_of_the_differences(q, p):
    leaves = [t.detach().requires_grad_() for d in (q(size=2), p(size=2)) for t in parameters(d)]
    split = 2 if q is full else 3

    def kl(*leaves):
        return kl_divergence(rebuilt(leaves[:split]), rebuilt(leaves[split:]))

    assert torch.autograd.gradcheck(kl, leaves)
    assert torch.autograd.gradgradcheck(kl, leaves)


@pytest.mark.parametrize("key", ["covariance_matrix", "precision_matrix"])
def test_the_gradient_reaches_the_matrix_that_was_given(key):
    q, p = full(size=2), full(size=2)

    def kl(of_q, of_p):
        matrices = (root @ root.mT + torch.eye(2, dtype=torch.float64) for root in (of_q, of_p))
        return kl_divergence(*(MultivariateNormal(d.loc, **{key: m}) for d, m in zip((q, p), matrices, strict=True)))

    roots = [d.scale_tril.detach().requires_grad_() for d in (q, p)]
    assert torch.autograd.gradcheck(kl, roots)


def parameters(d):
    if isinstance(d, MultivariateNormal):
        return d.loc, d.scale_tril
    return d.loc, d.cov_factor, d.cov_diag


def rebuilt(leaves):
    if len(leaves) == 2:
        return MultivariateNormal(leaves[0], scale_tril=leaves[1].tril(), validate_args=False)
    return LowRankMultivariateNormal(*leaves)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_parameter_of_low_rank_that_is_nan_gives_nan_to_its_own_element_alone(rank):
    q, p = (
        LowRankMultivariateNormal(torch.zeros(2, 3), torch.ones(2, 3, rank), torch.full((2, 3), d)) for d in (1.0, 2.0)
    )
    expected = kl_divergence(q, p)
    p._unbroadcasted_cov_diag = torch.tensor([[2.0, 2.0, torch.nan], [2.0, 2.0, 2.0]])  # torch's constructor raises
    value = kl_divergence(q, p)
    assert value[0].isnan()
    assert value[1] == expected[1]
