"""Second derivatives of sampled KLs, whose mean over every draw that there is has to be that of the KL."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Distribution, MixtureSameFamily, Normal, StudentT, kl_divergence

from tests.flows import FLOWS, plain
from torch_klloss import kl_from_log_probs
from torch_klloss.methods import MonteCarlo
from torch_klloss.samplers import Points

F64 = torch.float64
CHUNKS = pytest.mark.parametrize("chunk_size", [None, 1, 2])


@dataclass(frozen=True, eq=False)
class Replay:
    """A sampler that hands out noise `[S, *batch, …]`, turned into points by a function of q."""

    noise: torch.Tensor
    points: object

    def draw(self, q: Distribution, num_samples: int, *, differentiable: bool) -> Points:
        x = self.points(q, self.noise)
        weights = torch.full((num_samples, *(1,) * len(q.batch_shape)), 1 / num_samples, dtype=F64)
        return Points(x if differentiable else x.detach(), weights, num_replicates=num_samples)


def hessian(f, parameters):
    theta = parameters.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(theta), theta, create_graph=True)
    if not grad.requires_grad:
        return torch.zeros(len(theta), len(theta), dtype=F64)
    return torch.stack([torch.autograd.grad(g, theta, retain_graph=True)[0] for g in grad])


def assert_same_curvature(estimate, exact, parameters, tolerance=1e-11):
    torch.testing.assert_close(hessian(estimate, parameters), hessian(exact, parameters), rtol=0, atol=tolerance)


def given(q, noise):
    return noise


def moved(q, noise):
    return q.loc + q.scale * noise


# Every draw of a Categorical.

LOGITS = torch.tensor([0.3, -1.2, 0.8, -0.5, 0.4, 0.2], dtype=F64)


def categoricals(theta):
    return Categorical(logits=theta[:3]), Categorical(logits=theta[3:])


def over_classes(num_samples, **options):
    x = torch.tensor(list(itertools.product(range(3), repeat=num_samples))).T

    def estimate(theta):
        q, p = categoricals(theta)
        probability = q.log_prob(x).sum(0).exp().detach()
        method = MonteCarlo(num_samples, sampler=Replay(x, given), **options)
        return (probability * method.estimate(q.expand(x.shape[1:]), p).value).sum()

    return estimate


@CHUNKS
@pytest.mark.parametrize("value", ["log_ratio", "entropy", "k2", "k3"])
@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_by_the_score_function_of_classes(num_samples, value, chunk_size):
    estimate = over_classes(num_samples, gradient="score_function", value=value, chunk_size=chunk_size)
    assert_same_curvature(estimate, lambda theta: kl_divergence(*categoricals(theta)), LOGITS)


@CHUNKS
def test_without_a_gradient_to_q_it_is_that_of_a_fixed_q(chunk_size):
    def exact(theta):
        return kl_divergence(*categoricals(torch.cat([theta[:3].detach(), theta[3:]])))

    assert_same_curvature(over_classes(2, gradient="none", chunk_size=chunk_size), exact, LOGITS)


def mixtures(theta):
    return (
        MixtureSameFamily(Categorical(logits=theta[:2]), Categorical(logits=theta[2:8].reshape(2, 3))),
        Categorical(logits=theta[8:]),
    )


@CHUNKS
@pytest.mark.parametrize("num_samples", [1, 2])
def test_by_the_score_function_of_a_mixture(num_samples, chunk_size):
    x = torch.tensor(list(itertools.product(range(3), repeat=2 * num_samples)))
    x = x.reshape(-1, num_samples, 2).movedim(1, 0)
    parameters = torch.cat([torch.tensor([0.2, -0.4], dtype=F64), LOGITS.flip(0), LOGITS[:3] - 0.3])

    def estimate(theta):
        q, p = mixtures(theta)
        probability = q.component_distribution.log_prob(x).sum((0, -1)).exp().detach()
        method = MonteCarlo(num_samples, sampler=Replay(x, given), gradient="score_function", chunk_size=chunk_size)
        return (probability * method.estimate(q.expand(x.shape[1:2]), p).value).sum()

    def exact(theta):
        q, p = mixtures(theta)
        log_q, log_p = (d.log_prob(torch.arange(3)) for d in (q, p))
        return (log_q.exp() * (log_q - log_p)).sum()

    assert_same_curvature(estimate, exact, parameters)


# Normals: the noise is integrated by Gauss-Hermite nodes, exactly for polynomials.

NORMALS = torch.tensor([0.4, 0.2, -0.3, -0.1], dtype=F64)


def normals(theta):
    return Normal(theta[0], theta[1].exp()), Normal(theta[2], theta[3].exp())


def hermite(num_nodes, num_samples):
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(num_nodes))
    pairs = list(itertools.product(range(num_nodes), repeat=num_samples))
    return nodes[torch.tensor(pairs)].T, (weights / weights.sum())[torch.tensor(pairs)].prod(-1)


def over_noise(num_samples, build=normals, num_nodes=8, **options):
    noise, probability = hermite(num_nodes, num_samples)

    def estimate(theta):
        q, p = build(theta)
        points = noise.unsqueeze(-1) if isinstance(q, MixtureSameFamily) else noise
        method = MonteCarlo(num_samples, sampler=Replay(points, moved), **options)
        return (probability * method.estimate(q.expand(noise.shape[1:]), p).value).sum()

    return estimate


@CHUNKS
@pytest.mark.parametrize("value", ["log_ratio", "k3"])
@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing", "score_function"])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_of_normals(num_samples, gradient, value, chunk_size):
    estimate = over_noise(num_samples, gradient=gradient, value=value, chunk_size=chunk_size)
    assert_same_curvature(estimate, lambda theta: kl_divergence(*normals(theta)), NORMALS)


def mixed_normals(theta):
    return MixtureSameFamily(Categorical(logits=theta[:2]), Normal(theta[2:4], theta[4:6].exp())), Normal(0.3, 1.5)


@CHUNKS
@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing", "score_function"])
def test_of_a_mixture_of_normals(gradient, chunk_size):
    parameters = torch.tensor([0.2, -0.3, 0.3, -0.4, 0.1, -0.1], dtype=F64)
    grid = torch.linspace(-12, 12, 4001, dtype=F64)

    def exact(theta):
        q, p = mixed_normals(theta)
        return torch.trapezoid(q.log_prob(grid).exp() * (q.log_prob(grid) - p.log_prob(grid)), grid)

    estimate = over_noise(1, mixed_normals, 120, gradient=gradient, chunk_size=chunk_size)
    assert_same_curvature(estimate, exact, parameters, tolerance=1e-6)


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS.keys())
@pytest.mark.parametrize("gradient", ["sticking_the_landing", "score_function"])
def test_of_a_network_it_is_that_of_the_same_law_of_tensors(flow, gradient):
    def curvature(build):
        torch.manual_seed(0)
        net, c = torch.nn.Linear(3, 4).double(), torch.linspace(-1.0, 1.0, 6, dtype=F64).reshape(2, 3)
        p = plain(torch.nn.Linear(3, 4).double().requires_grad_(False), c)
        torch.manual_seed(1)
        value = MonteCarlo(3, gradient=gradient).estimate(build(net, c), p).value.sum()
        grads = torch.autograd.grad(value, net.parameters(), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), net.parameters())

    torch.testing.assert_close(curvature(flow), curvature(plain), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing", "score_function"])
def test_under_transforms_they_are_those_of_the_backward_pass(gradient):
    estimate = over_noise(2, gradient=gradient)
    expected = hessian(estimate, NORMALS)
    for transform in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.grad(f))):
        torch.testing.assert_close(transform(estimate)(NORMALS), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value", ["k1", "k3"])
@pytest.mark.parametrize("gradient", ["score_function", "k2"])
@pytest.mark.parametrize("behavior", [None, torch.tensor([0.5, 0.1, -0.2], dtype=F64)], ids=["own", "other"])
def test_from_log_probs(behavior, gradient, value):
    x = torch.tensor(list(itertools.product(range(3), repeat=2))).T

    def estimate(theta):
        q, p = categoricals(theta)
        b = q if behavior is None else Categorical(logits=behavior)
        log_b = None if behavior is None else b.log_prob(x)
        probability = b.log_prob(x).sum(0).exp().detach()
        kl = kl_from_log_probs(q.log_prob(x), p.log_prob(x), gradient=gradient, value=value, log_behavior=log_b)
        return (probability * kl).sum()

    assert_same_curvature(estimate, lambda theta: kl_divergence(*categoricals(theta)), LOGITS)


@CHUNKS
def test_with_a_quadratic_that_is_integrated(chunk_size):
    def students(theta):
        return Normal(theta[0], theta[1].exp()), StudentT(6.0, theta[2], theta[3].exp())

    estimate, sampled = (over_noise(2, students, 12, value=v, chunk_size=chunk_size) for v in ("taylor", "log_ratio"))
    assert_same_curvature(estimate, sampled, NORMALS)


@pytest.mark.parametrize(
    "options", [{"gradient": "mixed"}, {"value": "control_variate"}], ids=lambda o: str(*o.values())
)
def test_they_are_refused_where_derivatives_are_taken_ahead(options):
    leaves = [t.clone().requires_grad_() for t in NORMALS]
    q, p = Normal(leaves[0], leaves[1].exp()), Normal(leaves[2], leaves[3].exp())
    value = MonteCarlo(16, **options).estimate(q, p).value
    by_p = torch.autograd.grad(value, leaves[2:], create_graph=True)
    torch.autograd.grad(by_p[1], leaves[2:], retain_graph=True)  # those of a fixed q
    for first, leaf in itertools.product(by_p, leaves[:2]):
        with pytest.raises(NotImplementedError, match="gradient='pathwise'"):
            torch.autograd.grad(first, leaf, allow_unused=True, retain_graph=True)
    with pytest.raises(NotImplementedError, match="gradient='pathwise'"):
        by_p[1].backward(retain_graph=True)
    with pytest.raises(NotImplementedError, match="gradient='pathwise'"):
        torch.autograd.grad(value, leaves[:2], create_graph=True)
