"""Sampled KLs in forward mode, in inference mode, where parameters are fixed, in threads, and for slow draws."""

import threading

import pytest
import torch
import torch.distributions as dist
from torch import nn
from torch.autograd import forward_ad
from torch.distributions import Independent, Laplace, Normal, StudentT, Uniform

from tests.flows import FLOWS
from torch_klloss.methods import MonteCarlo
from torch_klloss.methods.monte_carlo import MixedGradient
from torch_klloss.samplers import IID, Antithetic, Sobol, Stratified
from torch_klloss.samplers.draws import noise_in_blocks

F64 = torch.float64
EYE = torch.eye(2, dtype=F64)


def vector(*values):
    return torch.tensor(values, dtype=F64)


FAMILIES = {
    "Normal": lambda t: Normal(t, 1 + t**2),
    "Gamma": lambda t: dist.Gamma(1 + t**2, 1 + t),
    "VonMises": lambda t: dist.VonMises(t, 1 + t),
    "MultivariateNormal": lambda t: dist.MultivariateNormal(t, EYE * (1 + t)),
    "LowRank": lambda t: dist.LowRankMultivariateNormal(t, t.unsqueeze(-1), 1 + t),
    "Laplace": lambda t: Laplace(t, 1 + t),
    "Beta": lambda t: dist.Beta(1 + t, 2 + t),
    "Dirichlet": lambda t: dist.Dirichlet(1 + t),
    "Categorical": lambda t: dist.Categorical(logits=torch.stack([t, t**2, 1 - t], -1)),
    "Poisson": lambda t: dist.Poisson(1 + t),
    "mixture": lambda t: dist.MixtureSameFamily(dist.Categorical(logits=t), Normal(t, 1 + t)),
    "LogNormal": lambda t: dist.LogNormal(t, 1 + t),
}


@pytest.mark.parametrize("sampler", [IID(), Sobol()], ids=repr)
@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing", "score_function", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tangent_in_forward_mode_is_the_derivative_of_the_backward_pass(family, gradient, sampler):
    build, t = FAMILIES[family], vector(0.3, 0.7)
    method = MonteCarlo(1 if gradient == "score_function" else 4, gradient=gradient, sampler=sampler)

    def value(q, p):
        torch.manual_seed(0)
        return method.estimate(q, p).value.sum()

    leaves = [t.clone().requires_grad_() for _ in range(2)]
    try:
        expected = sum(
            g.sum()
            for g in torch.autograd.grad(value(*map(build, leaves)), leaves, materialize_grads=True, allow_unused=True)
        )
    except NotImplementedError:
        return  # refused
    with forward_ad.dual_level():
        try:
            result = value(*(build(forward_ad.make_dual(t, torch.ones_like(t))) for _ in range(2)))
        except (NotImplementedError, RuntimeError) as error:
            assert "forward" in str(error).lower() or "jvp" in str(error)  # noqa: PT017
            return
        tangent = forward_ad.unpack_dual(result).tangent
    torch.testing.assert_close(torch.zeros(()) if tangent is None else tangent, expected, check_dtype=False)


OWN_DERIVATIVES = [
    ("log_ratio", "mixed"),
    ("log_ratio", "a state"),
    *((value, gradient) for value in ("control_variate", "taylor") for gradient in ("pathwise", "none")),
]
PRIORS = {
    "a Student": lambda t: StudentT(4 + t),
    "kinks": lambda t: Laplace(t, 1.0),
    "a constant": lambda t: Uniform(-100 + t, 100 + t),
}


@pytest.mark.parametrize(("value", "gradient"), OWN_DERIVATIVES)
@pytest.mark.parametrize("prior", PRIORS)
def test_estimators_that_differentiate_give_the_same_numbers_whatever_requires_a_gradient(value, gradient, prior):
    def run(required, mode):
        leaves = [
            vector(*v).requires_grad_(r) for v, r in zip([(0.3, 0.9), (0.5, 0.6), (0.2, 0.1)], required, strict=True)
        ]
        method = MonteCarlo(8, value=value, gradient=MixedGradient() if gradient == "a state" else gradient)
        with mode:
            torch.manual_seed(0)
            result = method.estimate(Normal(leaves[0] * 1.0, leaves[1] * 1.0), PRIORS[prior](leaves[2])).value
        assert not (result.requires_grad and not torch.is_grad_enabled())
        wrt = [leaf for leaf in leaves if leaf.requires_grad]
        if not result.requires_grad:
            return result, {}
        found = torch.autograd.grad(result.sum(), wrt, allow_unused=True, materialize_grads=True)
        return result.detach(), dict(zip([i for i, r in enumerate(required) if r], found, strict=True))

    every, gradients = run((True, True, True), torch.enable_grad())
    for required in [(False, False, False), (True, False, False), (False, True, True), (False, False, True)]:
        for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
            result, found = run(required, mode)
            torch.testing.assert_close(result.clone(), every, rtol=1e-12, atol=1e-14)
            for i, g in found.items():
                torch.testing.assert_close(g, gradients[i], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sampler", [IID(), Antithetic(), Stratified(), Sobol()], ids=repr)
@pytest.mark.parametrize("family", ["Normal", "MultivariateNormal", "LowRank", "Categorical", "mixture", "VonMises"])
def test_a_generator_gives_the_same_numbers_in_threads_as_alone(family, sampler):
    q, p = (FAMILIES[family](vector(*values)) for values in ((0.3, 0.7), (0.1, 0.5)))
    method = MonteCarlo(70, sampler=sampler if family != "mixture" else IID(), gradient="none")

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.stack(
            [method(q, p, generator) if callable(method) else method.estimate(q, p, generator).value for _ in range(5)]
        )

    alone = [draw(seed) for seed in range(4)]
    together = [None] * 4

    def run(seed):
        together[seed] = draw(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


SLOW = {
    "Normal": lambda o: Normal(0 * o, o),
    "Gamma": lambda o: dist.Gamma(o, o),
    "Dirichlet": lambda o: dist.Dirichlet(o),
    "StudentT": lambda o: StudentT(3 * o),
    "Uniform": lambda o: Uniform(0 * o, o),
    "Exponential": lambda o: dist.Exponential(o),
    "Cauchy": lambda o: dist.Cauchy(0 * o, o),
    "Kumaraswamy": lambda o: dist.Kumaraswamy(o, o),
    "Bernoulli": lambda o: dist.Bernoulli(0.3 * o),
    "Poisson": lambda o: dist.Poisson(o),
}
IN_PARTS = {"Categorical": lambda o: dist.Categorical(o), "VonMises": lambda o: dist.VonMises(0 * o, o)}


@pytest.mark.parametrize("family", [*SLOW, *IN_PARTS])
def test_draws_made_at_once_are_those_of_the_blocks(family):
    q, calls = {**SLOW, **IN_PARTS}[family](torch.ones(3, 2)), []

    def make(n):
        calls.append(n)
        return (q.rsample if q.has_rsample else q.sample)(torch.Size((n,)))

    parts = []
    for is_slow in (True, False):
        torch.manual_seed(0)
        parts.append(noise_in_blocks(make, 200, torch.device("cpu"), is_slow=is_slow))
    after = torch.get_rng_state()
    assert torch.equal(parts[0](0, 200), parts[1](0, 200))
    assert torch.equal(parts[0](70, 150), parts[1](0, 200)[70:150])
    assert torch.equal(torch.get_rng_state(), after)
    assert calls[0] == 200
    assert (calls[1] == 64) == (family in IN_PARTS) or family in SLOW


class Counting(FLOWS["a network of its own"]):
    """A flow that gives its log-density together with its draws."""

    draws, densities = 0, 0

    def expand(self, batch_shape, _instance=None):
        return Counting(self.network, self.context.expand(*batch_shape, -1))

    def rsample_and_log_prob(self, sample_shape=()):
        Counting.draws += 1
        x = super().rsample(sample_shape)
        return x, super().log_prob(x)

    def log_prob(self, value):
        Counting.densities += 1
        return super().log_prob(value)


class Sharper(Counting):
    """Another density, with the `rsample_and_log_prob` that it inherits."""

    def log_prob(self, value):
        return super().log_prob(value) + 1.0


@pytest.mark.parametrize("chunk_size", [None, 50])
@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing"])
def test_a_flow_is_drawn_in_one_pass_that_gives_its_density_too(gradient, chunk_size):
    torch.manual_seed(0)
    net, c = nn.Linear(3, 4).double(), torch.randn(5, 3, dtype=F64)
    p = Independent(StudentT(torch.full((2,), 4.0, dtype=F64)), 1)

    def run(kind):
        torch.manual_seed(1)
        value = MonteCarlo(200, gradient=gradient, chunk_size=chunk_size).estimate(kind(net, c), p).value.sum()
        return value.detach(), *torch.autograd.grad(value, net.parameters())

    expected = run(FLOWS["a network of its own"])
    Counting.draws = Counting.densities = 0
    torch.testing.assert_close(run(Counting), expected, rtol=1e-10, atol=1e-12)
    if chunk_size is None:
        assert (Counting.draws, Counting.densities) == (1, int(gradient == "sticking_the_landing"))
    torch.testing.assert_close(run(Sharper)[0], expected[0] + 5.0)
