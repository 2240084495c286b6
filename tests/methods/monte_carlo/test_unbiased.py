"""The expectation of `MonteCarlo`, taken over every draw that there is: proofs, where a sample would be a guess.

Each proof runs on the library's estimator and on its well-known wrong twins, which it has to reject.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Normal, Uniform, kl_divergence

from tests.methods.monte_carlo.moments import Moments
from torch_klloss.methods import MonteCarlo
from torch_klloss.samplers import Points

Estimator = Callable[[Distribution, Distribution, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Replay:
    """A sampler that hands out given points, each a function of q."""

    x: Callable[[Distribution], Tensor]

    def draw(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Points:
        x = self.x(q) if differentiable else self.x(q).detach()
        weights = torch.full((num_samples,), 1 / num_samples, dtype=torch.float64)
        return Points(x, weights.reshape(-1, *(1,) * len(q.batch_shape)), num_replicates=num_samples)


def library(gradient: str) -> Estimator:
    """Return the library's estimator, at points that may carry a gradient."""

    def estimate(q: Distribution, p: Distribution, x: Tensor) -> Tensor:
        return MonteCarlo(len(x), sampler=Replay(lambda _: x), gradient=gradient).estimate(q, p).value

    return estimate


def log_ratio(q: Distribution, p: Distribution, x: Tensor) -> Tensor:
    return q.log_prob(x) - p.log_prob(x)


def moments(value: Tensor, weights: Tensor, q: Tensor, p: Tensor) -> Moments:
    """Weight values `[n]`, one a draw, and their gradients to the parameters `[n, k]` of q and p."""
    mean = (weights * value).sum()
    grads = torch.autograd.grad(mean, (q, p), allow_unused=True)
    return Moments(mean.detach(), *(torch.zeros_like(q[0]) if g is None else g.sum(0) for g in grads))


def matches(actual: Moments, expected: Moments, tolerance: float = 1e-12) -> bool:
    return all(torch.allclose(a, e, rtol=0, atol=tolerance) for a, e in zip(actual, expected, strict=True))


# Finite support: K classes, every one of the K^S draws, each with its probability.

Q_LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64)
P_LOGITS = torch.tensor([-0.5, 0.4, 0.2, 1.1], dtype=torch.float64)


def categoricals(n: int) -> tuple[Tensor, Tensor, Categorical, Categorical]:
    logits = [logits.expand(n, -1).clone().requires_grad_() for logits in (Q_LOGITS, P_LOGITS)]
    return *logits, *(Categorical(logits=each) for each in logits)


def over_all_draws(estimate: Estimator, num_samples: int) -> Moments:
    x = torch.tensor(list(itertools.product(range(4), repeat=num_samples))).T
    q_logits, p_logits, q, p = categoricals(x.shape[1])
    weights = q.log_prob(x).detach().sum(0).exp()
    return moments(estimate(q, p, x), weights, q_logits, p_logits)


def exact_categorical(swapped: bool = False) -> Moments:
    q_logits, p_logits, q, p = categoricals(1)
    kl = (p.probs * (p.logits - q.logits) if swapped else q.probs * (q.logits - p.logits)).sum(-1)
    return moments(kl, torch.ones(1, dtype=torch.float64), q_logits, p_logits)


@pytest.mark.parametrize("num_samples", [1, 2, 3])
@pytest.mark.parametrize("gradient", ["score_function", "auto"])
def test_score_function_is_unbiased_over_all_draws(gradient, num_samples):
    assert matches(over_all_draws(library(gradient), num_samples), exact_categorical())


@pytest.mark.parametrize("num_samples", [1, 2])
def test_gradient_none_is_unbiased_for_p_and_zero_for_q(num_samples):
    exact = exact_categorical()
    without = exact._replace(grad_q=torch.zeros_like(exact.grad_q))
    assert matches(over_all_draws(library("none"), num_samples), without)


def k3(q: Distribution, p: Distribution, x: Tensor) -> Tensor:
    ratio = log_ratio(q, p, x)
    return torch.expm1(-ratio) + ratio


def test_the_proof_rejects_a_second_weighting_by_the_density():
    def weighted_again(q, p, x):
        return (q.log_prob(x).exp() * log_ratio(q, p, x)).mean(0)

    result = over_all_draws(weighted_again, 2)
    assert not matches(result, exact_categorical())
    q, p = Categorical(logits=Q_LOGITS), Categorical(logits=P_LOGITS)
    torch.testing.assert_close(result.value, (q.probs**2 * (q.logits - p.logits)).sum(), rtol=0, atol=1e-12)


def test_the_proof_rejects_the_mean_log_ratio_of_detached_samples_whose_gradient_is_zero():
    result, exact = over_all_draws(lambda q, p, x: log_ratio(q, p, x).mean(0), 2), exact_categorical()
    assert not matches(result, exact)
    assert matches(result, exact._replace(grad_q=torch.zeros(4, dtype=torch.float64)))


def test_the_proof_rejects_k3_on_detached_samples_whose_gradient_is_that_of_the_other_direction():
    result, exact = over_all_draws(lambda q, p, x: k3(q, p, x).mean(0), 2), exact_categorical()
    assert not matches(result, exact)
    assert matches(result, exact._replace(grad_q=exact_categorical(swapped=True).grad_q))


@pytest.mark.parametrize("num_samples", [2, 3])
def test_the_proof_rejects_a_baseline_that_includes_its_own_sample(num_samples):
    def self_including(q, p, x):
        ratio, log_q = log_ratio(q, p, x), q.log_prob(x)
        advantage = (ratio - ratio.mean(0)).detach()
        return (log_q.detach() - p.log_prob(x) + advantage * (log_q - log_q.detach())).mean(0)

    result, exact = over_all_draws(self_including, num_samples), exact_categorical()
    assert not matches(result, exact)
    assert matches(result, exact._replace(grad_q=exact.grad_q * (num_samples - 1) / num_samples))


# Continuous: the base noise of the reparameterisation, integrated by Gauss-Hermite nodes.

Q_NORMAL = torch.tensor([0.4, 0.2], dtype=torch.float64)  # mean and log standard deviation: q is the wider one,
P_NORMAL = torch.tensor([-0.3, -0.1], dtype=torch.float64)  # so that k3 has a finite variance


def normals(n: int) -> tuple[Tensor, Tensor, Normal, Normal]:
    raw = [parameters.expand(n, -1).clone().requires_grad_() for parameters in (Q_NORMAL, P_NORMAL)]
    return *raw, *(Normal(each[:, 0], each[:, 1].exp()) for each in raw)


def over_all_noise(estimate: Estimator, num_samples: int, num_nodes: int = 40) -> Moments:
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(num_nodes))
    noise = torch.cartesian_prod(*[nodes] * num_samples).reshape(-1, num_samples).T
    probability = torch.cartesian_prod(*[weights / weights.sum()] * num_samples).reshape(-1, num_samples).prod(-1)
    q_raw, p_raw, q, p = normals(noise.shape[1])
    return moments(estimate(q, p, q.loc + q.scale * noise), probability, q_raw, p_raw)


def exact_normal(swapped: bool = False) -> Moments:
    q_raw, p_raw, q, p = normals(1)
    kl = kl_divergence(p, q) if swapped else kl_divergence(q, p)
    return moments(kl, torch.ones(1, dtype=torch.float64), q_raw, p_raw)


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing", "auto", "score_function"])
def test_every_gradient_is_unbiased_over_all_noise(gradient, num_samples):
    assert matches(over_all_noise(library(gradient), num_samples), exact_normal(), 1e-11)


def sticking(estimate_with: Callable[[Tensor], Tensor]) -> Estimator:
    """Stop the parameters of q inside log q, leaving the path through x."""

    def estimate(q, p, x):
        stopped = Normal(q.loc.detach(), q.scale.detach())
        return estimate_with(stopped.log_prob(x) - p.log_prob(x)).mean(0)

    return estimate


def test_the_proof_rejects_k3_that_sticks_the_landing():
    result, exact, other = (
        over_all_noise(sticking(lambda r: torch.expm1(-r) + r), 1),
        exact_normal(),
        exact_normal(True),
    )
    assert not matches(result, exact, 1e-6)
    assert matches(result, exact._replace(grad_q=exact.grad_q - other.grad_q), 1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda q, p, x: (q.log_prob(x).exp() * log_ratio(q, p, x)).mean(0), id="weighted_again"),
        pytest.param(lambda q, p, x: log_ratio(q, p, x.detach()).mean(0), id="sample_for_rsample"),
        pytest.param(lambda q, p, x: (log_ratio(q, p, x) ** 2 / 2).mean(0), id="k2"),
        pytest.param(lambda q, p, x: k3(q, p, x.detach()).mean(0), id="k3_detached"),
    ],
)
def test_the_integral_over_the_noise_rejects(wrong):
    assert not matches(over_all_noise(wrong, 1), exact_normal(), 1e-3)


def test_sticking_the_landing_has_no_variance_at_q_equal_to_p():
    raw = Q_NORMAL.clone().requires_grad_()
    q, p = Normal(raw[0], raw[1].exp()), Normal(raw[0].detach(), raw[1].exp().detach())
    grads = {
        gradient: torch.autograd.grad(MonteCarlo(1, gradient=gradient).estimate(q, p).value, raw, retain_graph=True)[0]
        for gradient in ("sticking_the_landing", "pathwise")
    }
    torch.testing.assert_close(grads["sticking_the_landing"], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-15)
    assert grads["pathwise"].abs().max() > 0.1


# A support that moves with the parameters.

UNIT_NODES = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000


def gradient_of_moving_end(estimate: Estimator) -> float:
    """Return the expected derivative of an estimate of KL(Uniform(0, θ)‖Normal) by θ at θ = 1."""
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    q, p = Uniform(torch.zeros_like(theta), theta, validate_args=False), Normal(0.5, 1.0)
    return torch.autograd.grad(estimate(q, p, theta * UNIT_NODES), theta)[0].item()


def test_where_the_support_moves_pathwise_is_right_and_the_others_would_not_be():
    # KL = -log θ + log √2π + E[(x - ½)²]/2, with derivative -1/θ + θ/3 - 1/4 at x = θu.
    truth = -1 + 1 / 3 - 1 / 4
    assert gradient_of_moving_end(library("pathwise")) == pytest.approx(truth, abs=1e-6)

    def stopped(q, p, x):
        return (-p.log_prob(x)).mean()

    def score(q, p, x):
        ratio = log_ratio(q, p, x.detach())
        return (ratio.detach() * q.log_prob(x.detach()) + ratio - ratio.detach()).mean()

    assert abs(gradient_of_moving_end(stopped) - truth) > 0.1
    assert abs(gradient_of_moving_end(score) - truth) > 0.1
