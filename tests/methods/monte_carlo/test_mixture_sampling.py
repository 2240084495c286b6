"""A mixture as q is drawn from component by component: proofs that value and gradient are unbiased, and its error.

The noise of the components is integrated over a grid, on which smooth integrands that vanish at both ends are exact to
all digits. An estimator is a sum over the components, so that its expectation needs the noise of each alone.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    ExpTransform,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    TransformedDistribution,
    Uniform,
    VonMises,
)

from tests.methods.monte_carlo.moments import Moments
from torch_klloss.methods import Enumeration, MixtureBound, MonteCarlo
from torch_klloss.samplers import IID, Points
from torch_klloss.samplers.components import prepare_by_component

F64 = torch.float64
NOISE = torch.linspace(-9, 9, 361, dtype=F64)
WEIGHTS = Normal(torch.zeros((), dtype=F64), 1.0).log_prob(NOISE).exp() * (NOISE[1] - NOISE[0])

# Logits, locations and log-scales of two components; then location and log-scale of p.
Q_RAW = torch.tensor([0.4, -0.3, -0.8, 1.1, 0.1, -0.2], dtype=F64)
P_RAW = torch.tensor([0.3, 0.4], dtype=F64)


@dataclass(frozen=True, eq=False)
class Replay:
    """A sampler that puts given noise `[S, …]` through the components, whatever it is asked for."""

    noise: Tensor

    def draw(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Points:
        x = q.loc + q.scale * self.noise
        weights = torch.full((num_samples, *(1,) * len(q.batch_shape)), 1 / num_samples, dtype=F64)
        return Points(x if differentiable else x.detach(), weights, num_replicates=num_samples)


def mixture(raw: Tensor) -> MixtureSameFamily:
    """Return the mixture of raw numbers `[*batch, 6]`."""
    logits, loc, log_scale = raw.split(2, -1)
    return MixtureSameFamily(Categorical(logits=logits), Normal(loc, log_scale.exp()))


def student(raw: Tensor) -> Distribution:
    return StudentT(4.0, raw[..., 0], raw[..., 1].exp())


Estimator = Callable[[Distribution, Distribution, Tensor], Tensor]


def over_all_noise(estimate: Estimator, num_samples: int, stride: int = 1) -> Moments:
    """Return the moments over every noise of `num_samples` draws, the same one for both components."""
    nodes, weights = NOISE[::stride], WEIGHTS[::stride] * stride
    noise = torch.cartesian_prod(*[nodes] * num_samples).reshape(-1, num_samples).T
    probability = torch.cartesian_prod(*[weights] * num_samples).reshape(-1, num_samples).prod(-1)
    q_raw, p_raw = (raw.expand(noise.shape[1], -1).clone().requires_grad_() for raw in (Q_RAW, P_RAW))
    value = (probability * estimate(mixture(q_raw), student(p_raw), noise.unsqueeze(-1))).sum()
    grads = torch.autograd.grad(value, (q_raw, p_raw), allow_unused=True)
    return Moments(value.detach(), *(torch.zeros(1, dtype=F64) if g is None else g.sum(0) for g in grads))


def exact() -> Moments:
    """Return the KL and its gradient by the trapezoid over x."""
    q_raw, p_raw = (raw.clone().requires_grad_() for raw in (Q_RAW, P_RAW))
    q, p = mixture(q_raw), student(p_raw)
    x = torch.linspace(-14, 14, 5601, dtype=F64)
    log_q = q.log_prob(x)
    kl = (log_q.exp() * (log_q - p.log_prob(x))).sum() * (x[1] - x[0])
    return Moments(kl.detach(), *torch.autograd.grad(kl, (q_raw, p_raw)))


def library(gradient: str) -> Estimator:
    def estimate(q: Distribution, p: Distribution, noise: Tensor) -> Tensor:
        return MonteCarlo(len(noise), sampler=Replay(noise), gradient=gradient).estimate(q, p).value

    return estimate


def matches(actual: Moments, expected: Moments, tolerance: float = 1e-9) -> bool:
    return all(torch.allclose(a, e, rtol=0, atol=tolerance) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("gradient", ["auto", "pathwise", "sticking_the_landing", "score_function"])
def test_value_and_gradient_are_unbiased_over_all_noise(gradient):
    assert matches(over_all_noise(library(gradient), 1), exact())


def test_the_baseline_of_other_draws_leaves_the_score_function_unbiased():
    assert matches(over_all_noise(library("score_function"), 2, stride=3), exact(), 1e-8)


def test_gradient_none_is_unbiased_for_p_and_zero_for_q():
    truth = exact()
    without = truth._replace(grad_q=torch.zeros_like(truth.grad_q))
    assert matches(over_all_noise(library("none"), 1), without)


def by_hand(q: MixtureSameFamily, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return points `[K, n]` of the components and their probabilities."""
    x = (q.component_distribution.loc + q.component_distribution.scale * noise[0]).movedim(-1, 0)
    return x, q.mixture_distribution.probs.movedim(-1, 0)


def weights_detached(q, p, noise):
    x, probs = by_hand(q, noise)
    return (probs.detach() * (q.log_prob(x) - p.log_prob(x))).sum(0)


def log_of_the_component(q, p, noise):
    x, probs = by_hand(q, noise)
    log_component = q.component_distribution.log_prob(x.movedim(0, -1)).movedim(-1, 0)
    return (probs * (log_component - p.log_prob(x))).sum(0)


def score_of_the_mixture(q, p, noise):
    x, probs = by_hand(q, noise)
    log_q, log_p = q.log_prob(x.detach()), p.log_prob(x.detach())
    ratio = (log_q - log_p).detach()
    return (probs * (log_q.detach() - log_p + ratio * (log_q - log_q.detach()))).sum(0)


def unweighted(q, p, noise):
    x, _ = by_hand(q, noise)
    return (q.log_prob(x) - p.log_prob(x)).mean(0)


def one_side_stuck(q, p, noise):
    x, probs = by_hand(q, noise)
    return (probs * (q.log_prob(x.detach()) - p.log_prob(x))).sum(0)


WRONG = [weights_detached, log_of_the_component, score_of_the_mixture, unweighted, one_side_stuck]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_the_proof_rejects(wrong):
    assert not matches(over_all_noise(wrong, 1), exact(), 1e-3)


def test_detached_weights_would_be_wrong_in_the_gradient_of_the_weights_alone():
    actual, truth = over_all_noise(weights_detached, 1), exact()
    assert (actual.grad_q[:2] - truth.grad_q[:2]).abs().max() > 1e-2
    torch.testing.assert_close(actual.value, truth.value, rtol=0, atol=1e-9)
    torch.testing.assert_close(actual.grad_q[2:], truth.grad_q[2:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing", "score_function"])
def test_a_shared_transform_changes_neither_value_nor_gradient(gradient):
    def transformed(q, p, noise):
        q, p = (TransformedDistribution(d, [ExpTransform()]) for d in (q, p))
        return library(gradient)(q, p, noise)

    # exp of a wide Student overflows nowhere on these points.
    assert matches(over_all_noise(transformed, 1), exact(), 1e-8)


# The error.


@pytest.mark.parametrize("num_samples", [2, 5])
def test_the_standard_error_is_that_of_many_repetitions(num_samples):
    q, p = mixture(Q_RAW.expand(20_000, 6)), student(P_RAW)
    estimate = MonteCarlo(num_samples).estimate(q, p)
    spread = estimate.value.var()
    stated = (estimate.std_error**2).mean()
    # The ratio of two variances from 20,000 repetitions; a tenth is over six of its standard errors.
    assert stated / spread == pytest.approx(1.0, abs=0.1)
    z = (estimate.value.mean() - exact().value) / (spread / 20_000) ** 0.5
    assert abs(z) < 6
    assert estimate.dof == num_samples - 1
    assert estimate.num_evaluations == 2 * num_samples


def test_the_error_is_smaller_than_that_of_draws_from_the_mixture():
    q, p = mixture(Q_RAW.expand(20_000, 6)), student(P_RAW)
    x = q.sample((6,))
    plain = (q.log_prob(x) - p.log_prob(x)).mean(0)
    by_component = MonteCarlo(3).estimate(q, p).value  # the same number of evaluations
    assert by_component.var() < 0.9 * plain.var()


def test_a_single_draw_tells_no_error():
    assert MonteCarlo(1).estimate(mixture(Q_RAW), student(P_RAW)).std_error.isnan()


def test_peeled_dimensions_are_summed_per_draw_before_the_error():
    q = Independent(mixture(Q_RAW.expand(3000, 4, 6)), 1)
    p = Independent(student(P_RAW.expand(4, 2)), 1)
    estimate = MonteCarlo(6).estimate(q, p)
    assert estimate.value.shape == estimate.std_error.shape == (3000,)
    assert (estimate.std_error**2).mean() / estimate.value.var() == pytest.approx(1.0, abs=0.2)
    assert abs(estimate.value.mean() - 4 * exact().value) < 6 * estimate.value.std() / 3000**0.5


MANY = {
    "vectors": (
        MixtureSameFamily(
            Categorical(torch.tensor([0.3, 0.7], dtype=F64)),
            Independent(Normal(torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=F64), 0.7), 1),
        ),
        MultivariateNormal(torch.zeros(2, dtype=F64), 2 * torch.eye(2, dtype=F64)),
    ),
    "Gaussian vectors": (
        MixtureSameFamily(
            Categorical(torch.tensor([0.3, 0.7], dtype=F64)),
            MultivariateNormal(torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=F64), torch.eye(2, dtype=F64)),
        ),
        MultivariateNormal(torch.zeros(2, dtype=F64), 2 * torch.eye(2, dtype=F64)),
    ),
}


@pytest.mark.parametrize(("q", "p"), MANY.values(), ids=MANY)
def test_events_of_several_dimensions_lie_between_their_bounds(q, p):
    estimate = MonteCarlo(20_000).estimate(q, p, torch.Generator().manual_seed(0))
    x = torch.cartesian_prod(*[torch.linspace(-9, 9, 301, dtype=F64)] * 2)
    log_q = q.log_prob(x)
    truth = (log_q.exp() * (log_q - p.log_prob(x))).sum() * (18 / 300) ** 2
    assert abs(estimate.value - truth) < 6 * estimate.std_error
    lower, upper = (MixtureBound(side).estimate(q, p).value for side in ("lower", "upper"))
    assert lower <= truth <= upper


def test_components_without_a_path_are_told_by_their_scores():
    q = MixtureSameFamily(Categorical(torch.ones(2, dtype=F64)), VonMises(torch.tensor([0.0, 2.0], dtype=F64), 3.0))
    assert MonteCarlo(4).estimate(q, VonMises(torch.zeros((), dtype=F64), 1.0)).value.isfinite()
    with pytest.raises(NotImplementedError, match=r"needs q.rsample, which MixtureSameFamily lacks"):
        MonteCarlo(4, gradient="pathwise").estimate(q, VonMises(0.0, 1.0))
    assert not MonteCarlo(4, gradient="pathwise").supports(q, VonMises(0.0, 1.0))


def counts(raw: Tensor) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(logits=raw[..., :2]), Poisson(raw[..., 2:].exp()))


PAIRS = torch.tensor(list(itertools.product(range(40), repeat=2)), dtype=F64).T  # all of two draws, one a column


@dataclass(frozen=True)
class EveryPair:
    """A sampler that hands out all pairs of draws, and lets only one component count."""

    component: int

    def draw(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Points:
        weights = torch.zeros(2, dtype=F64)
        weights[self.component] = 1 / num_samples
        return Points(PAIRS.unsqueeze(-1).expand(-1, -1, 2), weights.expand(2, 1, 2), num_replicates=num_samples)


def test_the_score_function_of_discrete_components_is_unbiased_over_all_draws():
    raw, p = torch.tensor([0.4, -0.3, 0.2, 1.3], dtype=F64, requires_grad=True), Poisson(torch.tensor(2.0, dtype=F64))
    q = counts(raw.expand(PAIRS.shape[1], 4))
    value = torch.zeros((), dtype=F64)
    for k in range(2):  # the estimate is a sum over the components, each of which weighs the pairs by its own law
        probability = Poisson(raw[2 + k].detach().exp()).log_prob(PAIRS).sum(0).exp()
        value = value + (probability * MonteCarlo(2, sampler=EveryPair(k)).estimate(q, p).value).sum()
    truth = Enumeration().estimate(counts(raw), p).value
    torch.testing.assert_close(value, truth, rtol=0, atol=1e-11)
    gradients = (torch.autograd.grad(each, raw)[0] for each in (value, truth))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


def test_components_whose_support_moves_are_refused():
    end = torch.tensor([1.0, 2.0], requires_grad=True)
    q = MixtureSameFamily(Categorical(torch.ones(2)), Uniform(torch.zeros(2), end))
    for gradient in ("auto", "pathwise", "sticking_the_landing", "score_function"):
        with pytest.raises(NotImplementedError, match="jumps where the support of a component ends"):
            MonteCarlo(4, gradient=gradient).estimate(q, Normal(0.0, 1.0))
    assert MonteCarlo(4, gradient="none").estimate(q, Normal(0.0, 1.0)).value.isfinite()


def test_a_component_that_is_never_drawn_may_be_anywhere():
    logits = torch.tensor([0.0, -math.inf], requires_grad=True)
    q = MixtureSameFamily(Categorical(logits=logits), Normal(torch.tensor([0.5, 1e30]), 0.1))
    p = Normal(0.0, 1.0)
    assert p.log_prob(torch.tensor(1e30)) == -math.inf
    value = MonteCarlo(8).estimate(q, p).value
    assert value.isfinite()
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_the_generator_alone_decides_the_draws():
    q, p = mixture(Q_RAW), student(P_RAW)
    values = [MonteCarlo(4).estimate(q, p, torch.Generator().manual_seed(3)).value for _ in range(2)]
    assert values[0] == values[1]


def test_batch_elements_have_noise_of_their_own():
    q, p = mixture(Q_RAW), student(P_RAW.expand(8, 2))
    assert MonteCarlo(4).estimate(q, p).value.unique().numel() == 8


def test_a_mixture_is_drawn_from_by_its_components_with_the_weights_of_both():
    q = mixture(Q_RAW.expand(5, 6))
    draw = prepare_by_component(IID(), q, 3, differentiable=False).part(0, 3)
    assert draw.points.x.shape == draw.points.weights.shape == (6, 5)
    torch.testing.assert_close(draw.points.expectation(torch.ones(6, 5, dtype=F64)), torch.ones(5, dtype=F64))
    torch.testing.assert_close(draw.points.weights[:2, 0] * 3, q.mixture_distribution.probs[0])
    with pytest.raises(ValueError, match="needs a MixtureSameFamily, got Normal"):
        prepare_by_component(IID(), Normal(0.0, 1.0), 3, differentiable=False)
