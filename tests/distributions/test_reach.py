"""Flows whose parameters no copy reaches: every loss is right for them, or refuses them by name."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    VonMises,
    constraints,
    kl_divergence,
)

from tests.flows import FLOWS, plain
from torch_klloss import AutoKL, ELBOLoss, MonteCarloKL
from torch_klloss.distributions.reach import has_hidden_parameters, has_path
from torch_klloss.elbo import IWAELoss
from torch_klloss.methods import MonteCarlo
from torch_klloss.samplers import Sobol

F64 = torch.float64
EACH = pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS.keys())


def network(seed=0, dtype=F64):
    torch.manual_seed(seed)
    return nn.Linear(3, 4).to(dtype)


def context(n=8, dtype=F64):
    return torch.linspace(-1.0, 1.0, 3 * n, dtype=dtype).reshape(n, 3)


def standard(n=8, dtype=F64):
    return Independent(Normal(torch.zeros(n, 2, dtype=dtype), torch.ones(n, 2, dtype=dtype)), 1)


def likelihood(z):
    return Independent(Normal(1.3 * z, 1.0, validate_args=False), 1)


def test_hidden_parameters_are_found_where_the_tensors_do_not_show_them():
    net = network()
    assert all(has_hidden_parameters(flow(net, context())) for flow in FLOWS.values())
    assert not has_hidden_parameters(plain(net, context()))
    net.requires_grad_(False)
    assert not any(has_hidden_parameters(flow(net, context())) for flow in FLOWS.values())


@EACH
@pytest.mark.parametrize("gradient", ["doubly_reparameterized", "pathwise"])
def test_an_importance_weighted_bound_of_a_flow_has_the_gradient_of_the_same_law_of_tensors(flow, gradient):
    def gradients(build):
        net, c = network(), context().requires_grad_()
        torch.manual_seed(1)
        loss = IWAELoss(4, gradient=gradient)(likelihood, torch.ones(8, 2, dtype=F64), build(net, c), standard())
        return torch.autograd.grad(loss, [*net.parameters(), c])

    torch.testing.assert_close(gradients(flow), gradients(plain), rtol=1e-9, atol=1e-12)


@EACH
@pytest.mark.parametrize("side", ["q", "p"])
@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing", "score_function"])
def test_balance_scales_the_gradient_to_a_network(flow, side, gradient):
    def gradients(balance):
        nets, c = (network(0), network(1)), context().requires_grad_()
        q, p = (build(net, c) for build, net in zip((flow, plain) if side == "q" else (plain, flow), nets, strict=True))
        torch.manual_seed(1)
        x = torch.zeros(8, 2, dtype=F64)
        loss = ELBOLoss(MonteCarloKL(4, gradient=gradient), balance=balance)(Normal(x, 1.0), x, q, p).loss
        return [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters(), retain_graph=True)])
            for net in nets
        ]

    (whole_q, whole_p), (scaled_q, scaled_p) = gradients(None), gradients(0.8)
    torch.testing.assert_close(scaled_q, 0.2 * whole_q, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled_p, 0.8 * whole_p, rtol=1e-9, atol=1e-12)


@EACH
def test_nan_in_the_context_of_a_masked_example_reaches_no_gradient_or_is_refused(flow):
    mask = torch.arange(8) < 5
    x = torch.zeros(8, 2, dtype=F64)
    losses = {
        "kl": lambda q: MonteCarloKL(2)(q, standard(), mask=mask),
        "prior": lambda q: MonteCarloKL(2)(standard(), q, mask=mask),
        "elbo": lambda q: ELBOLoss(MonteCarloKL(2))(Normal(x, 1.0), x, q, standard(), mask=mask).loss,
    }
    for loss in losses.values():
        net, c = network(), context()
        c[5:] = math.nan
        try:
            value = loss(flow(net, c))
        except ValueError as error:
            assert "masked examples must have numbers inside of TransformedDistribution" in str(error)  # noqa: PT017
            continue
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, net.parameters()))


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("swap", [False, True])
def test_a_flow_in_half_precision_is_evaluated_where_torch_does(flow, dtype, swap):
    net, c = network(dtype=dtype), context(dtype=dtype)
    pair, reference = [flow(net, c), standard(dtype=dtype)], [plain(net, c), standard(dtype=dtype)]
    order = -1 if swap else 1
    (q, p), reference = pair[::order], AutoKL()(*reference[::order])
    loss = MonteCarloKL(1024)(q, p)
    assert loss.dtype == torch.float32
    assert abs(loss - reference) < 0.1 * (1 + reference)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, net.parameters()))
    IWAELoss(2)(likelihood, torch.ones(8, 2, dtype=dtype), q, p).backward()


class Joint(Distribution):
    """Independent parts one after the other, of which some have no `rsample`, as other libraries join them."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, *parts):
        self.parts = parts
        super().__init__(parts[0].batch_shape, torch.Size([len(parts)]), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Joint(*(part.expand(batch_shape) for part in self.parts))

    def rsample(self, sample_shape=()):
        draws = [part.rsample(sample_shape) if part.has_rsample else part.sample(sample_shape) for part in self.parts]
        return torch.stack(draws, -1)

    def log_prob(self, value):
        return sum(part.log_prob(x) for part, x in zip(self.parts, value.unbind(-1), strict=True))


class Promising(TransformedDistribution):
    """A transformed distribution that has `rsample` whatever its base has."""

    has_rsample = True

    def expand(self, batch_shape, _instance=None):
        return Promising(self.base_dist.expand(batch_shape), self.transforms, validate_args=False)

    def rsample(self, sample_shape=()):
        base = self.base_dist
        x = base.rsample(sample_shape) if base.has_rsample else base.sample(sample_shape)
        for transform in self.transforms:
            x = transform(x)
        return x


def bernoulli(t):
    return Bernoulli(logits=t, validate_args=False)


def turned(t):
    return Promising(VonMises(t, torch.ones_like(t)), [AffineTransform(0.0, 2.0)], validate_args=False)


WITHOUT_PATH = {
    "counts": (lambda t: Joint(bernoulli(t)), lambda t: kl_divergence(bernoulli(t), bernoulli(0 * t))),
    "counts and numbers": (
        lambda t: Joint(bernoulli(t), Normal(t, 1.0)),
        lambda t: kl_divergence(bernoulli(t), bernoulli(0 * t)) + t**2 / 2,
    ),
    "angles": (turned, lambda t: 0.44638996 * (1 - t.cos())),  # I₁(1)/I₀(1)
}
WITH_PATH = {
    "numbers": (lambda t: Joint(Normal(t, 1.0), Normal(t, 1.0)), lambda t: t**2),
    "a number": (lambda t: Promising(Normal(t, 1.0), [AffineTransform(0.0, 2.0)]), lambda t: t**2 / 2),
}


@pytest.mark.parametrize(("num_samples", "chunk_size"), [(1, None), (4, None), (4, 1)])
@pytest.mark.parametrize("case", [*WITHOUT_PATH, *WITH_PATH])
def test_draws_without_a_path_get_the_score_function(case, num_samples, chunk_size):
    build, kl = {**WITHOUT_PATH, **WITH_PATH}[case]
    n = 20_000
    t = torch.full((n,), 0.7, dtype=F64, requires_grad=True)
    torch.manual_seed(0)
    value = MonteCarloKL(num_samples, chunk_size=chunk_size, reduction="sum")(
        build(t), build(torch.zeros((), dtype=F64).expand(n))
    )
    (found,) = torch.autograd.grad(value, t)
    (true,) = torch.autograd.grad(kl(t).sum(), t)
    assert abs(found.mean() - true[0]) < 5 * found.std() / n**0.5


@pytest.mark.parametrize("gradient", ["pathwise", "sticking_the_landing"])
def test_a_path_that_is_asked_for_and_is_not_there_is_refused(gradient):
    t = torch.full((3,), 0.7, dtype=F64, requires_grad=True)
    for build, _ in WITHOUT_PATH.values():
        with pytest.raises(NotImplementedError, match=r"draws of q\.rsample that carry a gradient to every parameter"):
            MonteCarlo(2, gradient=gradient).estimate(build(t), build(0 * t.detach()))
        with pytest.raises(NotImplementedError, match=r"draws of q\.rsample that carry a gradient to every parameter"):
            IWAELoss(2)(likelihood, torch.zeros(3, 1), build(t), build(0 * t.detach()))
    for build, _ in WITH_PATH.values():
        assert MonteCarlo(2, gradient=gradient).estimate(build(t), build(0 * t.detach())).value.requires_grad


def test_the_score_function_in_place_of_a_path_needs_independent_draws():
    t = torch.full((3,), 0.7, dtype=F64, requires_grad=True)
    with pytest.raises(NotImplementedError):
        MonteCarlo(2, sampler=Sobol()).estimate(Joint(bernoulli(t)), Joint(bernoulli(t.detach())))


class Wrapped(Distribution):
    """A distribution within one of a class of its own."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.batch_shape, inner.event_shape, validate_args=False)

    def rsample(self, sample_shape=()):
        return self.inner.rsample(sample_shape)

    def log_prob(self, value):
        return self.inner.log_prob(value)


def test_what_a_density_derives_from_parameters_that_move_the_draw_needs_no_path():
    loc = torch.zeros(2, dtype=F64, requires_grad=True)
    root = torch.eye(2, dtype=F64).requires_grad_()
    factor, diagonal = (torch.ones(*shape, dtype=F64, requires_grad=True) for shape in ((2, 1), (2,)))
    for inner in (
        MultivariateNormal(loc, covariance_matrix=root @ root.mT),
        MultivariateNormal(loc, precision_matrix=root @ root.mT),
        MultivariateNormal(loc, scale_tril=root),
        LowRankMultivariateNormal(loc, factor, diagonal),
    ):
        q = Wrapped(inner)
        x = q.rsample((2,))
        assert has_path(q, x, q.log_prob(x))
        assert not has_path(q, x.detach() + 0 * loc, q.log_prob(x))


@EACH
@pytest.mark.parametrize("side", ["q", "p"])
@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_loss_without_examples_is_connected_to_the_network_with_a_zero_gradient(flow, side, bad):
    net, c = network(), (context() + bad).requires_grad_()
    pair = (flow(net, c), standard()) if side == "q" else (standard(), flow(net, c))
    loss = MonteCarloKL(4, reduction="sum")(*pair, mask=torch.zeros(8, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in net.parameters())
