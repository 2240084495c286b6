"""The same numbers for every chunk size and sampler, and within torch's checkpoints."""

import itertools

import pytest
import torch
from torch.distributions import (
    Categorical,
    ExpTransform,
    Gamma,
    Independent,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    TransformedDistribution,
)
from torch.utils.checkpoint import checkpoint

from torch_klloss.methods import MonteCarlo
from torch_klloss.samplers import IID, Antithetic, Sobol, Stratified

F64 = torch.float64
THETA = torch.tensor([0.3, 0.7], dtype=F64)


def mixture(t, component=None):
    return MixtureSameFamily(Categorical(logits=t), Normal(t, 1 + t) if component is None else component)


def deep(t):
    """Return a mixture of batch shape [3]."""
    return mixture(torch.stack([t, t**2, 1 - t]), Normal(t.expand(3, 2), 1 + t))


MIXTURES = {
    "scalar": (mixture, lambda t: Normal(t[0], 1 + t[1])),
    "scalar, p a mixture": (mixture, lambda t: mixture(1 - t, Normal(1 - t, 2 + t))),
    "scalar, p a batch": (mixture, lambda t: Normal(t.repeat(2)[:3], 1 + t[1])),
    "batch, p broadcast": (deep, lambda t: Normal(t[:1], 1 + t[1])),
    "within Independent": (
        lambda t: Independent(deep(t), 1),
        lambda t: Independent(Normal(t[0].expand(3), 1 + t[1]), 1),
    ),
    "vectors": (
        lambda t: mixture(t, Independent(Normal(torch.stack([t, t**2]), 1 + t), 1)),
        lambda t: Independent(Normal(t, 1 + t), 1),
    ),
    "transformed": (
        lambda t: TransformedDistribution(mixture(t), [ExpTransform()]),
        lambda t: LogNormal(t[0], 1 + t[1]),
    ),
    "no mixture, p broadcast": (lambda t: Normal(t[0], 1 + t[1]), lambda t: StudentT(4 + t, t[0], 1 + t[1])),
}
OPTIONS = [
    ("pathwise", "log_ratio"),
    ("sticking_the_landing", "log_ratio"),
    ("score_function", "log_ratio"),
    ("none", "log_ratio"),
    ("score_function", "k3"),
    ("pathwise", "k2"),
    ("pathwise", "entropy"),
    ("pathwise", "taylor"),
    ("pathwise", "control_variate"),
]


def numbers(pair, method):
    t = THETA.clone().requires_grad_()
    torch.manual_seed(0)
    estimate = method.estimate(*(build(t) for build in pair))
    (gradient,) = torch.autograd.grad(estimate.value.sum(), t)
    return [estimate.value.detach(), gradient, estimate.std_error, estimate.skewness]


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::torch_klloss.methods.monte_carlo.tail_diagnostics.HeavyTailWarning")
@pytest.mark.parametrize("sampler", [IID(), Antithetic(), Stratified(), Sobol()], ids=repr)
@pytest.mark.parametrize("name", MIXTURES)
def test_the_chunk_size_changes_no_number(name, sampler):
    asked = 0
    for (gradient, value), num_samples in itertools.product(OPTIONS, (2, 6, 70)):
        if num_samples == 70 and gradient not in ("pathwise", "score_function"):
            continue
        options = {"sampler": sampler, "gradient": gradient, "value": value}
        try:
            expected = numbers(MIXTURES[name], MonteCarlo(num_samples, **options))
        except (NotImplementedError, ValueError):
            continue  # of this q, or these draws
        for chunk_size in (1, 4) if num_samples < 70 else (33,):
            found = numbers(MIXTURES[name], MonteCarlo(num_samples, chunk_size=chunk_size, **options))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, equal_nan=True)
            asked += 1
    assert asked >= 12  # of the four gradients that every one of these takes


PAIRS = {
    "Normal": (lambda t: Normal(t, 1 + t**2), lambda t: StudentT(4 + t, t, 1 + t)),
    "Gamma": (lambda t: Gamma(1 + t**2, 1 + t), lambda t: LogNormal(t, 1 + t)),
    "MultivariateNormal": (
        lambda t: MultivariateNormal(t, torch.eye(2, dtype=F64) * (1 + t)),
        lambda t: Independent(StudentT(4 + t), 1),
    ),
    "Categorical": (
        lambda t: Categorical(logits=torch.stack([t, t**2, 1 - t], -1)),
        lambda t: Categorical(logits=torch.stack([t, 1 - t, t**2], -1)),
    ),
    "mixture": (deep, lambda t: Normal(t[0], 1 + t[1])),
}


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::torch_klloss.methods.monte_carlo.tail_diagnostics.HeavyTailWarning")
@pytest.mark.parametrize("inside", [True, False], ids=["built inside", "built outside"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_a_checkpoint_changes_no_number(name, use_reentrant, inside):
    for (gradient, value), chunk_size in itertools.product([*OPTIONS, ("score_function", "entropy")], (None, 2)):
        method = MonteCarlo(6, gradient=gradient, value=value, chunk_size=chunk_size)
        try:
            expected, by_theta, *_ = numbers(PAIRS[name], method)
        except NotImplementedError:
            continue
        t = THETA.clone().requires_grad_()
        outside = [build(t) for build in PAIRS[name]]

        def kl(t, method=method, outside=outside):
            torch.manual_seed(0)
            return method.estimate(*([build(t) for build in PAIRS[name]] if inside else outside)).value

        given = t if inside else torch.zeros((), requires_grad=True)
        found = checkpoint(kl, given, use_reentrant=use_reentrant)
        found.sum().backward()
        torch.testing.assert_close([found.detach(), t.grad], [expected, by_theta], rtol=1e-10, atol=1e-12)
