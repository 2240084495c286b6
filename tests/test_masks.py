"""Masks: an example of weight zero reaches neither the value nor a gradient, even if it is NaN."""

import math

import pytest
import torch
from torch.distributions import (
    Categorical,
    Gamma,
    Gumbel,
    Independent,
    MultivariateNormal,
    Normal,
    StudentT,
    Uniform,
    kl_divergence,
)

from torch_klloss import AnalyticKL, AutoKL, MonteCarloKL, categorical, diagonal_normal, standard_normal_like

KEEP = torch.tensor([True, False, True])
STANDARD = Normal(0.0, 1.0)


def test_a_mean_divides_by_the_sum_of_the_mask():
    q = Normal(torch.tensor([2.0, 7.0, 4.0]), 1.0)  # KLs 2, 24.5 and 8
    assert AnalyticKL()(q, STANDARD, mask=KEEP) == 5
    assert AnalyticKL(reduction="sum")(q, STANDARD, mask=KEEP) == 10
    assert AnalyticKL(reduction="none")(q, STANDARD, mask=KEEP).tolist() == [2, 0, 8]
    weights = torch.tensor([3.0, 0.0, 1.0])
    assert AnalyticKL()(q, STANDARD, mask=weights) == 14 / 4
    assert AnalyticKL(reduction="sum")(q, STANDARD, mask=weights) == 14
    assert AnalyticKL(reduction="none")(q, STANDARD, mask=weights).tolist() == [6, 0, 8]
    assert AnalyticKL()(q, STANDARD, mask=weights.int()) == 14 / 4


def test_a_mask_weighs_examples_and_not_latent_dimensions():
    q = Normal(torch.full((3, 4), 2.0), 1.0)
    assert AnalyticKL()(q, STANDARD, mask=KEEP) == 8
    assert AnalyticKL(batch_dims=2)(q, STANDARD, mask=KEEP.unsqueeze(-1)) == 2
    assert AnalyticKL(batch_dims=2, reduction="sum")(q, STANDARD, mask=torch.tensor([1.0, 0.0, 0.0, 0.0])) == 6
    assert AnalyticKL(reduction="sum")(q, STANDARD, mask=torch.tensor(True)) == 24


@pytest.mark.parametrize("loss", [AutoKL(), MonteCarloKL(2)], ids=["exact", "sampled"])
def test_a_mask_of_the_wrong_shape_is_an_error(loss):
    q = Normal(torch.zeros(3, 4), 1.0)
    for shape in ((4,), (3, 4), (2,), (1, 3)):
        with pytest.raises(ValueError, match=r"shape of the examples \(3,\), got .*batch_dims says how many"):
            loss(q, STANDARD, mask=torch.ones(shape))
    with pytest.raises(TypeError, match="mask must be a tensor, bool or of weights, got list"):
        loss(q, STANDARD, mask=[True, False, True])


def test_a_mask_that_sums_to_zero_has_no_mean():
    q, empty = Normal(torch.ones(3), 1.0), torch.zeros(3)
    with pytest.raises(ValueError, match="divides by the sum of the mask, which is zero"):
        AnalyticKL()(q, STANDARD, mask=empty)
    assert AnalyticKL(reduction="sum")(q, STANDARD, mask=empty) == 0
    assert AnalyticKL(reduction="none")(q, STANDARD, mask=empty).tolist() == [0, 0, 0]


def test_a_mask_that_sums_to_zero_gives_nan_under_vmap():
    def kl(mean: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = diagonal_normal(mean, torch.zeros_like(mean))
        return AutoKL()(q, standard_normal_like(q), mask=mask)

    mean, masks = torch.ones(2, 3, 4), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert torch.func.vmap(kl)(mean, masks).isnan().tolist() == [False, True]


NAN, INF, EYE = math.nan, math.inf, torch.eye(3)


def gaussian(loc, scale_tril) -> MultivariateNormal:
    return MultivariateNormal(loc, scale_tril=scale_tril)


def logits(first, second) -> torch.Tensor:
    return torch.stack((first.expand(3), second.expand(3)), -1)


# Each case: a parameter with three examples, the second one bad, and the q and p built from it and a shared parameter.
CASES = {
    "nan_mean": (NAN, lambda v, s: (Normal(v, 1.0), Normal(s, 1.0))),
    "inf_mean": (INF, lambda v, s: (Normal(v, 1.0), Normal(s, 1.0))),
    "zero_scale": (0.0, lambda v, s: (Normal(0.0, v), Normal(s, 1.0))),
    "nan_logvar": (NAN, lambda v, s: (q := diagonal_normal(s.expand(3, 1), v[:, None]), standard_normal_like(q))),
    "latent": (NAN, lambda v, s: (Normal(v[:, None].expand(3, 4), 1.0), Normal(s, 1.0))),
    "nan_in_p": (NAN, lambda v, s: (Normal(s, 1.0), Normal(v, 1.0))),
    "broadcast": (NAN, lambda v, s: (Normal(s.expand(4), 1.0), Normal(v[:, None].expand(3, 4), 1.0))),
    "not_contained": (9.0, lambda v, s: (Uniform(0.0, v), Uniform(0.0, s + 3.0))),
    "gamma": (0.0, lambda v, s: (Gamma(v, 1.0), Gamma(s, 1.0))),
    "gumbel": (NAN, lambda v, s: (Gumbel(v, 1.0), Gumbel(s, 1.0))),
    "masked_logit": (-INF, lambda v, s: (Categorical(logits=logits(s, s)), Categorical(logits=logits(v, s)))),
    "raw_logits": (NAN, lambda v, s: (categorical(logits(v, s)), categorical(torch.zeros(2)))),
    "mvn": (NAN, lambda v, s: (gaussian(v[:, None].expand(3, 3), EYE * s), gaussian(torch.zeros(3), EYE))),
    "student_t": (NAN, lambda v, s: (Normal(v, 1.0), StudentT(4.0, s))),
    "independent": (
        NAN,
        lambda v, s: (Independent(Normal(v[:, None], 1.0), 1), Independent(StudentT(4.0, s[None]), 1)),
    ),
}
cases = pytest.mark.parametrize(("bad", "build"), CASES.values(), ids=CASES)


def loss_and_gradients(values, build, loss, mask):
    values = torch.tensor(values, requires_grad=True)
    shared = torch.tensor(1.5, requires_grad=True)
    q, p = build(values, shared)
    total = loss(q, p, mask=mask, generator=torch.Generator().manual_seed(0))
    return total.detach(), *torch.autograd.grad(total.sum(), (values, shared), allow_unused=True)


@cases
@pytest.mark.usefixtures("unvalidated")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss_type", [AutoKL, MonteCarloKL])
@pytest.mark.parametrize("mask", [KEEP, torch.tensor([0.5, 0.0, 2.0])], ids=["bool", "weights"])
def test_a_bad_example_of_weight_zero_reaches_no_value_and_no_gradient(bad, build, reduction, loss_type, mask):
    loss = loss_type(reduction=reduction)
    total, by_values, by_shared = loss_and_gradients([1.0, bad, 2.0], build, loss, mask)
    assert total.isfinite().all()
    assert by_values.isfinite().all()
    assert by_values[1] == 0
    assert by_shared is None or by_shared.isfinite()
    # Any other value in its place gives the same result.
    expected = loss_and_gradients([1.0, 1.0, 2.0], build, loss, mask)
    for actual, exact in zip((total, by_values, by_shared), expected, strict=True):
        assert actual is exact is None or torch.equal(actual, exact)


@cases
@pytest.mark.usefixtures("unvalidated")
def test_multiplying_the_values_by_the_mask_is_not_enough(bad, build):
    def by_hand(q, p, mask, generator):
        return (AutoKL(reduction="none")(q, p, generator=generator) * mask).sum()

    total, *grads = loss_and_gradients([1.0, bad, 2.0], build, by_hand, KEEP.float())
    assert not (total.isfinite() and all(g is None or g.isfinite().all() for g in grads))


@cases
@pytest.mark.usefixtures("unvalidated")
@pytest.mark.parametrize("loss_type", [AutoKL, MonteCarloKL])
@pytest.mark.parametrize("place", [0, 1])
def test_a_mask_of_zeros_gives_no_gradient(bad, build, loss_type, place):
    values = [1.0, 2.0, 2.0]
    values[place] = bad
    total, *grads = loss_and_gradients(values, build, loss_type(reduction="sum"), torch.zeros(3))
    assert total == 0
    assert all(g is None or (g == 0).all() for g in grads)


def test_the_masked_mean_is_the_mean_over_the_unmasked_examples():
    loc, mask = torch.randn(6, 3), torch.tensor([True, False, True, True, False, False])
    q, p = Normal(loc, torch.rand(6, 3) + 0.5), Normal(0.3, 2.0)
    left = kl_divergence(Normal(q.loc[mask], q.scale[mask]), p).sum(-1).mean()
    torch.testing.assert_close(AutoKL()(q, p, mask=mask), left)


def test_parameters_that_all_examples_share_survive_a_mask():
    # Three examples in three dimensions share one covariance.
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-1.0, 0.3, 0.5]])
    loc, p = torch.randn(3, 3), MultivariateNormal(torch.zeros(3), torch.eye(3))
    for options in ({"scale_tril": factor}, {"covariance_matrix": factor @ factor.T}):
        whole = AutoKL(reduction="none")(MultivariateNormal(loc, **options), p)
        masked = AutoKL(reduction="none")(MultivariateNormal(loc, **options), p, mask=~KEEP)
        torch.testing.assert_close(masked, torch.where(KEEP, 0.0, whole))


def test_a_mask_on_the_estimate_is_the_mask_on_the_loss():
    loss, q = MonteCarloKL(16), Normal(torch.tensor([1.0, NAN, 2.0]), 1.0, validate_args=False)
    reduced = loss.reduce(loss.estimate(q, STANDARD), mask=KEEP)
    assert reduced.value.isfinite()
    assert reduced.std_error > 0
    kept = loss.reduce(loss.estimate(Normal(torch.tensor([1.0, 2.0]), 1.0), STANDARD))
    assert kept.value.shape == reduced.value.shape
