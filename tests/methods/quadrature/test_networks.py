"""Quadrature of densities whose parameters come from a network: the gradient reaches it, or the pair is refused."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Distribution, Independent, Normal, TransformedDistribution, constraints
from torch.distributions import kl_divergence as closed_form

from tests.flows import NetworkShift
from torch_klloss import AutoKL, MonteCarloKL, QuadratureKL
from torch_klloss.methods import MonteCarlo, Quadrature

F64 = torch.float64


class Given(Distribution):
    """A Normal whose parameters a function returns when they are needed."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real
    has_rsample = True

    def __init__(self, parameters, batch_shape):
        self.parameters = parameters
        super().__init__(batch_shape, torch.Size(), validate_args=False)

    def normal(self):
        log_scale, shift = self.parameters().unbind(-1)
        return Normal(shift, log_scale.exp(), validate_args=False)

    def rsample(self, sample_shape=()):
        return self.normal().rsample(sample_shape)

    def log_prob(self, value):
        return self.normal().log_prob(value)


class WithoutDraws(Given):
    has_rsample = False

    def rsample(self, sample_shape=()):
        raise NotImplementedError


class Owner(Given):
    """The same with the network and its context as attributes."""

    def __init__(self, network, context):
        self.network, self.context = network, context
        super().__init__(None, context.shape[:-1])

    def normal(self):
        log_scale, shift = self.network(self.context).unbind(-1)
        return Normal(shift, log_scale.exp(), validate_args=False)


class Shift(NetworkShift):
    """The same of one number."""

    domain = codomain = constraints.real

    def parameters(self):
        return self.network(self.context).unbind(-1)

    def log_abs_det_jacobian(self, x, y):
        return self.parameters()[0].expand(x.shape)


def hidden_shift(network, context):
    class HiddenShift(Shift):
        def parameters(self):
            return network(context).unbind(-1)

    return HiddenShift(None, None)


def hidden_law(network, context):
    class Hidden(Given):
        def normal(self):
            return plain(network, context)

    return Hidden(None, context.shape[:-1])


def transformed(shift):
    def build(network, context):
        zeros = torch.zeros(context.shape[:-1], dtype=context.dtype)
        return TransformedDistribution(Normal(zeros, torch.ones_like(zeros)), [shift(network, context)])

    return build


def plain(network, context):
    log_scale, shift = network(context).unbind(-1)
    return Normal(shift, log_scale.exp(), validate_args=False)


def call(network, context):
    return network(context)


def given(kind, function):
    return lambda network, context: kind(function(network, context), context.shape[:-1])


# Their network meets the nodes, or a context that is converted, in another precision than its own.
REACHED = {
    "an attribute": Owner,
    "an attribute of a transform": transformed(Shift),
    "a partial function": given(Given, lambda net, c: partial(net, c)),
    "a partial function of the network": given(Given, lambda net, c: partial(call, net, c)),
    "no draws": given(WithoutDraws, lambda net, c: partial(net, c)),
}
UNREACHED = {
    "a closure": given(Given, lambda net, c: lambda: net(c)),
    "a class in a function": hidden_law,
    "a transform's class in a function": transformed(hidden_shift),
    "a closure without draws": given(WithoutDraws, lambda net, c: lambda: net(c)),
}
FLOWS = {**REACHED, **UNREACHED}


def gradients(build, kl, side="q", n=4, dtype=F64, requires_grad=True):
    torch.manual_seed(0)
    network = nn.Linear(3, 2).to(dtype).requires_grad_(requires_grad)
    context = torch.linspace(-1.0, 1.0, 3 * n, dtype=dtype).reshape(n, 3).requires_grad_()
    d, other = build(network, context), Normal(torch.full((n,), 0.3, dtype=dtype), torch.tensor(1.5, dtype=dtype))
    value = kl(d, other) if side == "q" else kl(other, d)
    wrt = [context, *network.parameters()] if requires_grad else [context]
    return value, *torch.autograd.grad(value.sum(), wrt)


def quadrature(q, p):
    return Quadrature().estimate(q, p).value


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS.keys())
@pytest.mark.parametrize("side", ["q", "p"])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["learned", "fixed"])
def test_the_gradient_reaches_the_network_and_what_it_is_given(flow, side, n, requires_grad):
    found = gradients(flow, quadrature, side, n, requires_grad=requires_grad)
    torch.testing.assert_close(
        found, gradients(plain, closed_form, side, n, requires_grad=requires_grad), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("flow", UNREACHED.values(), ids=UNREACHED.keys())
@pytest.mark.parametrize("side", ["q", "p"])
def test_a_network_in_single_precision_that_nothing_converts_is_read_as_it_is(flow, side):
    found = gradients(flow, quadrature, side, dtype=torch.float32)
    torch.testing.assert_close(found, gradients(plain, closed_form, side, dtype=torch.float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flow", REACHED.values(), ids=REACHED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["q", "p"])
def test_a_network_that_does_not_take_float64_is_refused_by_name(flow, dtype, side):
    with pytest.raises(NotImplementedError, match=r"in float64, which \w+ does not take .*\.double\(\)"):
        gradients(flow, quadrature, side, dtype=dtype)


@pytest.mark.parametrize("name", ["an attribute", "an attribute of a transform", "a partial function"])
def test_the_next_method_is_asked_for_what_quadrature_refuses(name):
    def seeded(kl):
        def evaluate(q, p):
            torch.manual_seed(1)
            return kl(q, p)

        return evaluate

    auto = AutoKL(fallback=[Quadrature(), MonteCarlo(8)], reduction="none", batch_dims=1)
    sampled = MonteCarloKL(8, reduction="none", batch_dims=1)
    found, expected = (gradients(FLOWS[name], seeded(kl), dtype=torch.float32) for kl in (auto, sampled))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS.keys())
def test_the_gradient_reaches_the_network_within_an_independent(flow):
    def loss(q, p):
        return QuadratureKL(reduction="sum", batch_dims=0)(Independent(q, 1), Independent(p.expand(q.batch_shape), 1))

    torch.testing.assert_close(gradients(flow, loss)[1:], gradients(plain, closed_form)[1:], rtol=1e-6, atol=1e-8)
