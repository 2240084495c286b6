"""Every value form with every gradient and every kind of draws: proved without bias, or refused.

The base noise is integrated over Gauss-Hermite nodes, on which polynomials are exact: q is a Normal, -log p a quartic.
The combinations are read off the options themselves, so that a new word needs a proof.
"""

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Normal, constraints, kl_divergence

from tests.methods.monte_carlo.moments import Moments
from torch_klloss import samplers
from torch_klloss.methods import MonteCarlo
from torch_klloss.methods.monte_carlo import mixed, surrogates
from torch_klloss.methods.monte_carlo.method import Gradient, Value
from torch_klloss.methods.monte_carlo.mixed import MixedGradient
from torch_klloss.samplers import IID, Points
from torch_klloss.samplers.draws import StoredDraws

F64 = torch.float64
Q_RAW = torch.tensor([0.4, -0.3], dtype=F64)  # mean and log standard deviation
P_RAW = torch.tensor([0.3, 0.7], dtype=F64)  # of x⁴/4 and x²/2


class Quartic(Distribution):
    """log p = -a x⁴/4 - b x²/2, known up to its constant."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        super().__init__(a.shape, validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        return -self.a * x**4 / 4 - self.b * x**2 / 2


def matches(actual: Moments, expected: Moments, tolerance: float = 1e-11) -> bool:
    return all(torch.allclose(a, e, rtol=0, atol=tolerance) for a, e in zip(actual, expected, strict=True))


def moments(value: Tensor, weights: Tensor, q: Tensor, p: Tensor) -> Moments:
    mean = (weights * value).sum()
    grads = torch.autograd.grad(mean, (q, p), allow_unused=True)
    summed = (torch.zeros(t.shape[-1], dtype=F64) if g is None else g for g, t in zip(grads, (q, p), strict=True))
    return Moments(mean.detach(), *(g.reshape(-1, g.shape[-1]).sum(0) for g in summed))


# Continuous.


def exact() -> Moments:
    """Return -H(q) + E[a x⁴/4 + b x²/2] by the moments of a Normal."""
    q, p = (raw.clone().requires_grad_() for raw in (Q_RAW, P_RAW))
    mean, std = q[0], q[1].exp()
    second, fourth = mean**2 + std**2, mean**4 + 6 * mean**2 * std**2 + 3 * std**4
    return moments(
        -Normal(mean, std).entropy() + p[0] * fourth / 4 + p[1] * second / 2, torch.ones((), dtype=F64), q, p
    )


class Grid(IID):
    """Independent draws, all of their noise `[S, N]` at once, one grid point a batch element."""

    def __init__(self, noise: Tensor) -> None:
        object.__setattr__(self, "noise", noise)

    def draw(self, q, num_samples, *, differentiable):
        return _laid_out(self.noise, q, num_samples, differentiable, num_replicates=num_samples)

    def prepare(self, q, num_samples, *, differentiable):
        return StoredDraws(self.draw(q, num_samples, differentiable=differentiable))


class Coupled:
    """Draws that know of one another: one randomisation, whose points are functions of the same noise."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def draw(self, q, num_samples, *, differentiable):
        return _laid_out(self.noise, q, num_samples, differentiable, num_replicates=1)


def _laid_out(noise, q, num_samples, differentiable, num_replicates):
    # Estimators lay S draws out as S of one element, S/2 of two folds, or one of S rows.
    noise = noise.unflatten(0, (-1, num_samples)).movedim(0, 1).reshape(num_samples, *q.batch_shape)
    x = q.loc + q.scale * noise
    weights = torch.full((num_samples, *(1,) * len(q.batch_shape)), 1 / num_samples, dtype=F64)
    return Points(x if differentiable else x.detach(), weights, num_replicates)


def product(num_axes: int, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Return every combination of nodes, `[axes, N]`, with its probability."""
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(num_nodes))
    grids = (torch.cartesian_prod(*[t] * num_axes).reshape(-1, num_axes).T for t in (nodes, weights / weights.sum()))
    noise, probability = grids
    return noise, probability.prod(0)


FITTED = {"control_variate", "mixed"}  # which need more draws than two: 3 nodes for each are exact to degree 5


def over_all_noise(value: str, gradient: str, coupling: str) -> Moments:
    """Return the moments over the noise of draws that are independent, mirrored, or all the same."""
    fitted = bool(FITTED & {value, gradient})
    num_samples, num_nodes = (8, 3) if fitted else (2, 8)
    if coupling == "independent":
        noise, probability = product(num_samples, num_nodes)
        sampler = Grid(noise)
    else:
        folds = 2 if fitted else 1  # independent of one another
        noise, probability = product(folds, 8)
        signs = torch.tensor([1.0, -1.0 if coupling == "mirrored" else 1.0], dtype=F64)
        each = signs.repeat(num_samples // folds // 2)
        noise = (noise.unsqueeze(1) * each[:, None]).flatten(0, 1)
        sampler = Coupled(noise)
    q, p = (raw.expand(1, noise.shape[1], -1).clone().requires_grad_() for raw in (Q_RAW, P_RAW))
    method = MonteCarlo(num_samples, sampler=sampler, value=value, gradient=gradient)
    estimate = method.estimate(Normal(q[..., 0], q[..., 1].exp()), Quartic(p[..., 0], p[..., 1]))
    return moments(estimate.value, probability, q, p)


# Finite: K = 4 classes, S = 2 draws, all 16 of them.

Q_LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=F64)
P_LOGITS = torch.tensor([-0.5, 0.4, 0.2, 1.1], dtype=F64)
DRAWS = torch.tensor(list(itertools.product(range(4), repeat=2))).T


class Listed:
    def __init__(self, num_replicates: int) -> None:
        self.num_replicates = num_replicates

    def draw(self, q, num_samples, *, differentiable):
        return Points(DRAWS, torch.full((2, 1), 0.5, dtype=F64), self.num_replicates)


def over_all_draws(value: str, gradient: str, num_replicates: int) -> Moments:
    raw = [logits.expand(16, -1).clone().requires_grad_() for logits in (Q_LOGITS, P_LOGITS)]
    q, p = (Categorical(logits=each) for each in raw)
    method = MonteCarlo(2, sampler=Listed(num_replicates), value=value, gradient=gradient)
    return moments(method.estimate(q, p).value, q.log_prob(DRAWS).detach().sum(0).exp(), *raw)


def exact_sum() -> Moments:
    raw = [logits.clone().requires_grad_() for logits in (Q_LOGITS, P_LOGITS)]
    return moments(kl_divergence(*(Categorical(logits=each) for each in raw)), torch.ones((), dtype=F64), *raw)


# Every combination.

KINDS = [
    kind
    for kind in vars(samplers).values()
    if isinstance(kind, type) and hasattr(kind, "draw") and not getattr(kind, "_is_protocol", False)
]
COUPLINGS = {kind: ("independent",) if kind is IID else ("mirrored", "the same") for kind in KINDS}
COMBINATIONS = list(itertools.product(get_args(Value), get_args(Gradient), KINDS))
IDS = [f"{value}-{gradient}-{kind.__name__}" for value, gradient, kind in COMBINATIONS]
SURROGATES = ("control_variate", "taylor")


def is_refused(value: str, gradient: str, kind: type, discrete: bool) -> bool:
    """State which combinations have to be refused; whatever else there is has to pass its proof."""
    if discrete and (value in SURROGATES or gradient in ("pathwise", "sticking_the_landing", "mixed")):
        return True
    if value in SURROGATES and gradient == "score_function":
        return True
    if value in ("entropy", *SURROGATES) and gradient in ("sticking_the_landing", "mixed"):
        return True
    if gradient == "mixed":
        return value != "log_ratio" or kind is not IID
    return kind is not IID and (gradient == "score_function" or (discrete and gradient == "auto"))


def promised(truth: Moments, gradient: str) -> Moments:
    return truth._replace(grad_q=torch.zeros_like(truth.grad_q)) if gradient == "none" else truth


@pytest.mark.parametrize(("value", "gradient", "kind"), COMBINATIONS, ids=IDS)
def test_every_combination_is_unbiased_over_all_noise_or_refused(value, gradient, kind):
    for coupling in COUPLINGS[kind]:
        if is_refused(value, gradient, kind, discrete=False):
            with pytest.raises((ValueError, NotImplementedError), match=r"use |Use "):
                over_all_noise(value, gradient, coupling)
            continue
        actual, expected = over_all_noise(value, gradient, coupling), promised(exact(), gradient)
        if value in ("k2", "k3"):  # another number, which is proved where it is an exact sum
            actual = actual._replace(value=expected.value)
        assert matches(actual, expected)


@pytest.mark.parametrize(("value", "gradient", "kind"), COMBINATIONS, ids=IDS)
def test_every_combination_is_unbiased_over_all_draws_or_refused(value, gradient, kind):
    num_replicates = 2 if kind is IID else 1
    if is_refused(value, gradient, kind, discrete=True):
        with pytest.raises((ValueError, NotImplementedError)):
            over_all_draws(value, gradient, num_replicates)
        return
    expected = promised(exact_sum(), gradient)
    if value == "k2":
        q, p = Categorical(logits=Q_LOGITS), Categorical(logits=P_LOGITS)
        biased = (q.probs * (q.logits - p.logits) ** 2).sum() / 2
        assert abs(biased - expected.value) > 0.01
        expected = expected._replace(value=biased)
    assert matches(over_all_draws(value, gradient, num_replicates), expected, 1e-13)


def test_the_kinds_of_draws_are_those_of_the_library():
    assert {kind.__name__ for kind in KINDS} == {"IID", "Antithetic", "Stratified", "Sobol"}


# The proofs reject what is wrong.


def test_a_fit_to_the_very_points_that_it_corrects_is_rejected(monkeypatch):
    fit = surrogates.ScoreRegression.fit

    def own(self):
        h = fit(self)
        return surrogates.Quadratic(h.center, h.scale, h.linear.flip(0), h.quadratic.flip(0), h.event_dims)

    monkeypatch.setattr(surrogates.ScoreRegression, "fit", own)
    assert not matches(over_all_noise("control_variate", "pathwise", "independent"), exact(), 1e-3)


def test_a_quadratic_whose_mean_is_forgotten_is_rejected(monkeypatch):
    monkeypatch.setattr(surrogates.Quadratic, "expectation", lambda h, loc, scale: torch.zeros_like(loc))
    for value in SURROGATES:
        assert not matches(over_all_noise(value, "pathwise", "independent"), exact(), 1e-3)


def test_a_mean_of_the_quadratic_without_its_gradient_is_rejected(monkeypatch):
    expectation = surrogates.Quadratic.expectation
    detached = lambda h, loc, scale: expectation(h, loc.detach(), scale.detach())
    monkeypatch.setattr(surrogates.Quadratic, "expectation", detached)
    for value in SURROGATES:
        actual, truth = over_all_noise(value, "pathwise", "independent"), exact()
        assert not matches(actual, truth, 1e-3)
        assert matches(actual._replace(grad_q=truth.grad_q), truth)  # the value cannot tell


def test_coefficients_from_the_draws_that_they_correct_are_rejected(monkeypatch):
    def own(grad, controls, half, pooled):
        return grad - mixed._predicted(controls, mixed._moments(grad, controls, pooled), pooled)

    monkeypatch.setattr(mixed, "_held_out", own)
    assert not matches(over_all_noise("log_ratio", "mixed", "independent"), exact(), 1e-3)


@pytest.mark.parametrize("coupling", ["mirrored", "the same"])
def test_a_baseline_from_draws_that_know_of_one_another_is_rejected(coupling, monkeypatch):
    monkeypatch.setattr("torch_klloss.methods.monte_carlo.log_ratio._Terms.check_independent", lambda self: None)
    actual, truth = over_all_noise("log_ratio", "score_function", coupling), exact()
    assert not matches(actual, truth, 1e-3)
    # Mirrored, a location gets twice its gradient, and a scale none at all.
    factor = torch.tensor([2.0, 0.0] if coupling == "mirrored" else [0.0, 0.0], dtype=F64)
    by_score = Moments(truth.value, truth.grad_q * factor, truth.grad_p)
    assert matches(actual, by_score)


@pytest.mark.parametrize("value", ["k2", "k3"])
def test_a_gradient_of_the_number_itself_is_rejected(value):
    raw = [logits.expand(16, -1).clone().requires_grad_() for logits in (Q_LOGITS, P_LOGITS)]
    q, p = (Categorical(logits=each) for each in raw)
    ratio = q.log_prob(DRAWS) - p.log_prob(DRAWS)
    number = ratio**2 / 2 if value == "k2" else torch.expm1(-ratio) + ratio
    actual = moments(number.mean(0), q.log_prob(DRAWS).detach().sum(0).exp(), *raw)
    truth = exact_sum()
    # k2 has the right gradient to q and the wrong one to p, k3 the reverse.
    right, wrong = ("grad_q", "grad_p") if value == "k2" else ("grad_p", "grad_q")
    torch.testing.assert_close(getattr(actual, right), getattr(truth, right), rtol=0, atol=1e-12)
    assert (getattr(actual, wrong) - getattr(truth, wrong)).abs().max() > 0.05


# What is remembered from step to step.


def remembering(state: MixedGradient) -> Moments:
    """Return the moments over the noise of four draws, after a step that all grid points remember alike."""
    noise, probability = product(4, 4)
    q, p = (raw.expand(1, noise.shape[1], -1).clone().requires_grad_() for raw in (Q_RAW, P_RAW))
    pair = Normal(q[..., 0], q[..., 1].exp()), Quartic(p[..., 0], p[..., 1])
    MonteCarlo(16, gradient=state).estimate(*pair)
    state.moments = [m[:1].expand_as(m) for m in state.moments]
    estimate = MonteCarlo(4, sampler=Grid(noise), gradient=state).estimate(*pair)
    return moments(estimate.value, probability, q, p)


def test_coefficients_of_earlier_steps_leave_the_gradient_unbiased():
    assert matches(remembering(MixedGradient()), exact())


def test_coefficients_that_know_the_step_they_are_used_in_are_rejected(monkeypatch):
    corrected = mixed._corrected

    def late(grads, scores, state, batch_dims):
        corrected(grads, scores, state, batch_dims)
        return corrected(grads, scores, state, batch_dims)

    monkeypatch.setattr(mixed, "_corrected", late)
    assert not matches(remembering(MixedGradient()), exact(), 1e-3)
