"""Bounds of the KL between mixtures."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Categorical,
    Distribution,
    Gamma,
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    Uniform,
    kl_divergence,
)

from torch_klloss import AutoKL
from torch_klloss.distributions.batch_dims import with_batch_dim
from torch_klloss.methods import MixtureBound

F64 = torch.float64


def normals(raw: Tensor) -> MixtureSameFamily:
    """Return the mixture of raw numbers `[*batch, 3 K]`: logits, locations, log-scales."""
    logits, loc, log_scale = raw.chunk(3, -1)
    return MixtureSameFamily(Categorical(logits=logits), Normal(loc, log_scale.exp()))


def truth(q: Distribution, p: Distribution) -> Tensor:
    x = torch.linspace(-60, 60, 24_001, dtype=F64).reshape(-1, *(1,) * len(q.batch_shape))
    log_q = q.log_prob(x)
    terms = torch.where(log_q > -700, log_q.exp() * (log_q - p.log_prob(x)), 0.0)
    return terms.sum(0) * 0.005


def drawn(num_components: int, spread: float) -> Tensor:
    raw = torch.randn(50, 3, num_components, dtype=F64)
    return (raw * torch.tensor([1.0, spread, 0.5], dtype=F64).unsqueeze(-1)).flatten(1)


@pytest.mark.parametrize("spread", [0.01, 0.3, 1.0, 5.0])
@pytest.mark.parametrize(("of_q", "of_p"), [(1, 1), (1, 3), (3, 1), (2, 2), (4, 3)])
def test_the_kl_of_normal_mixtures_lies_between_the_bounds(of_q, of_p, spread):
    q, p = normals(drawn(of_q, spread)), normals(drawn(of_p, spread))
    exact = truth(q, p)
    lower, upper = (MixtureBound(side).estimate(q, p) for side in ("lower", "upper"))
    assert (lower.value <= exact + 1e-10).all()
    assert (upper.value >= exact - 1e-10).all()
    assert (lower.value >= 0).all()
    assert (lower.method, upper.method) == ("lower bound", "upper bound")
    assert not lower.exact
    assert not upper.exact
    assert lower.std_error is lower.error_bound is upper.std_error is upper.error_bound is None


def test_what_hershey_and_olsen_call_the_variational_approximation_is_no_bound():
    # The difference of two lower bounds, as a product of Gaussians or a bound of each half alone gives.
    below = above = False
    for spread in (0.3, 1.0, 5.0):
        q, p = normals(drawn(3, spread)), normals(drawn(3, spread))
        own, other = q.component_distribution, p.component_distribution
        to_own = kl_divergence(with_batch_dim(own, 0), with_batch_dim(own, 1))
        to_other = kl_divergence(with_batch_dim(own, 0), with_batch_dim(other, 1))
        sums = [
            (m.mixture_distribution.logits.unsqueeze(-2) - kl).logsumexp(-1) for m, kl in ((q, to_own), (p, to_other))
        ]
        approximation = (q.mixture_distribution.probs * (sums[0] - sums[1])).sum(-1)
        exact = truth(q, p)
        below |= bool((approximation < exact - 1e-3).any())
        above |= bool((approximation > exact + 1e-3).any())
    assert below
    assert above


@pytest.mark.parametrize("num_iterations", [1, 2, 5, 1000])
def test_every_step_of_the_upper_bound_is_a_bound_and_none_is_worse(num_iterations):
    torch.manual_seed(1)
    q, p = normals(drawn(3, 1.0)), normals(drawn(4, 1.0))
    value = MixtureBound("upper", num_iterations).estimate(q, p).value
    assert (value >= truth(q, p) - 1e-10).all()
    pairs = kl_divergence(with_batch_dim(q.component_distribution, 0), with_batch_dim(p.component_distribution, 1))
    weights = q.mixture_distribution.probs.unsqueeze(-1) * p.mixture_distribution.probs.unsqueeze(-2)
    assert (value <= (weights * pairs).sum((-1, -2)) + 1e-12).all()
    more = MixtureBound("upper", num_iterations + 1).estimate(q, p).value
    assert (more <= value + 1e-12).all()


def test_the_upper_bound_of_a_mixture_with_itself_is_zero():
    q = normals(drawn(3, 2.0))
    value = MixtureBound("upper").estimate(q, q).value
    assert (value.abs() < 1e-6).all()
    assert (MixtureBound("lower").estimate(q, q).value == 0).all()


def test_against_a_single_p_the_upper_bound_is_the_mean_of_the_components():
    q = normals(drawn(3, 2.0))
    p = Normal(torch.tensor(0.5, dtype=F64), 2.0)
    mean = (q.mixture_distribution.probs * kl_divergence(q.component_distribution, p)).sum(-1)
    torch.testing.assert_close(MixtureBound("upper").estimate(q, p).value, mean, rtol=1e-12, atol=1e-13)


def test_between_single_ones_both_are_nearly_the_kl():
    q, p = normals(torch.tensor([0.0, 1.0, 0.2], dtype=F64)), Normal(torch.tensor(0.0, dtype=F64), 1.5)
    exact = truth(q, p)
    torch.testing.assert_close(MixtureBound("upper").estimate(q, p).value, exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(MixtureBound("lower").estimate(q, p).value, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("side", ["upper", "lower"])
def test_the_gradient_is_that_of_the_bound(side):
    q_raw = torch.tensor([0.2, -0.1, -2.0, 3.0, -0.3, 0.1], dtype=F64, requires_grad=True)
    p_raw = torch.tensor([0.0, 0.3, 0.5, 1.0, 0.5, 0.2], dtype=F64, requires_grad=True)

    def bound(q_raw: Tensor, p_raw: Tensor) -> Tensor:
        return MixtureBound(side, 100_000).estimate(normals(q_raw), normals(p_raw)).value

    value = bound(q_raw, p_raw)
    assert value > 0
    for i, grad in enumerate(torch.autograd.grad(value, (q_raw, p_raw))):
        for k in range(6):
            step = torch.zeros(6, dtype=F64)
            step[k] = 1e-5
            ends = [
                bound(*(raw + (sign * step if j == i else 0) for j, raw in enumerate((q_raw, p_raw))))
                for sign in (1, -1)
            ]
            difference = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close(grad[k], difference.detach(), rtol=1e-5, atol=1e-7)


def mixture(component: Distribution, batch_shape: tuple[int, ...] = ()) -> MixtureSameFamily:
    weights = torch.tensor([0.3, 0.7], dtype=F64).expand(*batch_shape, 2)
    return MixtureSameFamily(Categorical(weights), component)


LOC = torch.tensor([[0.0, 1.0, 0.5], [2.0, -1.0, 0.0]], dtype=F64)
DIAGONAL = Independent(Normal(LOC, 0.7), 1)
GAUSSIANS = {
    "diagonal": mixture(DIAGONAL),
    "full": mixture(MultivariateNormal(LOC, 0.49 * torch.eye(3, dtype=F64))),
    "low rank": mixture(
        LowRankMultivariateNormal(LOC, torch.zeros(2, 3, 1, dtype=F64), torch.full((2, 3), 0.49, dtype=F64))
    ),
}


@pytest.mark.parametrize("side", ["upper", "lower"])
@pytest.mark.parametrize("name", ["full", "low rank"])
def test_the_same_gaussian_in_another_class_has_the_same_bounds(side, name):
    p = MultivariateNormal(torch.ones(3, dtype=F64), 2 * torch.eye(3, dtype=F64))
    for pair in ((GAUSSIANS[name], p), (p, GAUSSIANS[name])):
        diagonal = [
            GAUSSIANS["diagonal"] if d is GAUSSIANS[name] else Independent(Normal(torch.ones_like(LOC[0]), 2**0.5), 1)
            for d in pair
        ]
        a, b = MixtureBound(side).estimate(*pair).value, MixtureBound(side).estimate(*diagonal).value
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_several_dimensions_add_up_where_they_are_independent():
    torch.manual_seed(3)
    q, p = normals(drawn(2, 1.0).reshape(10, 5, 6)), normals(drawn(3, 1.0)[:5])
    for side in ("upper", "lower"):
        each = MixtureBound(side).estimate(q, p).value
        together = MixtureBound(side).estimate(Independent(q, 1), Independent(p, 1)).value
        assert each.shape == (10, 5)
        torch.testing.assert_close(together, each.sum(-1))


def test_other_families_have_an_upper_bound_and_no_lower_one():
    gammas = mixture(Gamma(torch.tensor([1.0, 4.0], dtype=F64), 1.0))
    poissons = mixture(Poisson(torch.tensor([1.0, 4.0], dtype=F64)))
    for q, p in ((gammas, Gamma(2.0, 1.0)), (Gamma(2.0, 1.0), gammas), (poissons, poissons)):
        assert MixtureBound("upper").estimate(q, p).value >= 0
        with pytest.raises(NotImplementedError, match=r"needs Normal or MultivariateNormal components"):
            MixtureBound("lower").estimate(q, p)


def test_a_pair_of_components_without_a_closed_form_is_refused():
    with pytest.raises(NotImplementedError, match=r"No closed form is registered for KL\(Normal‖StudentT\)"):
        MixtureBound("upper").estimate(mixture(Normal(LOC[:, 0], 1.0)), StudentT(4.0))
    with pytest.raises(NotImplementedError, match="MixtureBound needs a MixtureSameFamily as q or p, got Normal and"):
        MixtureBound("upper").estimate(Normal(0.0, 1.0), Laplace(0.0, 1.0))


def test_components_that_p_does_not_reach_make_the_bound_infinite_unless_they_weigh_nothing():
    q = mixture(Uniform(torch.tensor([0.0, 2.0], dtype=F64), 3.0))
    p = Beta(torch.tensor(1.0, dtype=F64), 1.0)
    assert MixtureBound("upper").estimate(
        q, Uniform(0.0, torch.tensor([3.0, 2.5], dtype=F64))
    ).value.isinf().tolist() == [
        False,
        True,
    ]
    never = MixtureSameFamily(
        Categorical(logits=torch.tensor([0.0, -math.inf], dtype=F64)),
        Uniform(torch.tensor([0.0, 2.0], dtype=F64), torch.tensor([1.0, 3.0], dtype=F64)),
    )
    assert MixtureBound("upper").estimate(never, p).value.abs() < 1e-12


def test_no_loss_takes_a_bound_by_default():
    q, p = GAUSSIANS["diagonal"], GAUSSIANS["full"]
    assert "bound" not in AutoKL().route(q, p)
    assert AutoKL(fallback=MixtureBound("upper")).estimate(q, p).method == "upper bound"


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="side must be 'upper' or 'lower', got 'both'"):
        MixtureBound("both")
    with pytest.raises(ValueError, match="num_iterations must be an integer of at least 1, got 0"):
        MixtureBound("upper", 0)
