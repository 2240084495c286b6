"""Distributions of other libraries, which keep torch's interface in their own way."""

import math

import pytest
import torch
from numpy.polynomial.legendre import leggauss
from torch.distributions import Distribution, Independent, Normal, constraints, register_kl
from torch.distributions.kl import _KL_REGISTRY

from torch_klloss import AnalyticKL, AutoKL, MonteCarloKL, has_closed_form, kl_divergence
from torch_klloss.distributions.supports import contained
from torch_klloss.elbo import IWAELoss, decompose_kl
from torch_klloss.methods import ClosedForm, Enumeration, MonteCarlo, Quadrature
from torch_klloss.samplers import IID, Antithetic, Sobol, Stratified
from torch_klloss.testing import check_kl


class Sized(Normal):
    """A Normal whose draws need a torch.Size, as a MultivariateNormal of GPyTorch does."""

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        sample_shape.numel()
        return super().rsample(sample_shape)

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        sample_shape.numel()
        return super().sample(sample_shape)

    def log_prob(self, value):
        return super().log_prob(value)


def sized(*shape):
    return Sized(torch.ones(shape), torch.full(shape, 2.0))


@pytest.mark.parametrize("sampler", [IID(), Antithetic(), Stratified(), Sobol()], ids=repr)
@pytest.mark.parametrize("gradient", ["pathwise", "none"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_draws_are_asked_for_by_a_torch_size(sampler, gradient, chunk_size):
    method = MonteCarlo(8, sampler=sampler, gradient=gradient, chunk_size=chunk_size)
    assert method.estimate(sized(3), Normal(0.0, 1.0)).value.isfinite().all()


@pytest.mark.parametrize("gradient", ["pathwise", "none"])
def test_an_iwae_asks_for_its_draws_by_a_torch_size(gradient):
    def likelihood(z):
        return Independent(Normal(z, 1.0), 1)

    loss = IWAELoss(4, gradient=gradient)
    value = loss(
        likelihood, torch.zeros(5, 3), Independent(sized(5, 3), 1), Independent(Normal(torch.zeros(3), 1.0), 1)
    )
    assert torch.as_tensor(value.loss if hasattr(value, "loss") else value).isfinite()


def test_every_other_draw_is_asked_for_by_a_torch_size():
    assert ClosedForm().supports(sized(3), Normal(0.0, 1.0))  # the density of its own is compared with its parent's
    q, p = Independent(sized(16, 3), 1), Independent(Normal(torch.zeros(16, 3), 1.0), 1)
    decompose_kl(q, p)
    check_kl(sized(3), Normal(torch.zeros(3), 1.0))


class Unreadable(Normal):
    """A Normal whose support raises, as a TanhNormal of TorchRL does."""

    @property
    def support(self):
        raise TypeError("'>=' not supported between instances of 'NoneType' and 'float'")


@pytest.mark.parametrize("method", [ClosedForm(), MonteCarlo(64), Enumeration()], ids=repr)
@pytest.mark.parametrize("swap", [False, True])
def test_a_support_that_cannot_be_read_is_an_unknown_one(method, swap):
    q, p = Unreadable(torch.zeros(3), torch.ones(3)), Normal(torch.ones(3), 1.0)
    q, p = (p, q) if swap else (q, p)
    if isinstance(method, Enumeration):
        assert method.supports(q, p) is False
        return
    assert method.estimate(q, p).value.isfinite().all()
    assert AutoKL(fallback=[Quadrature(), MonteCarlo(8)])(q, p).isfinite()


class Unexpanded(Distribution):
    """A Normal of scale one that has no expand, as third parties write them."""

    arg_constraints, support, has_rsample = {}, constraints.real, True

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def log_prob(self, x):
        return -0.5 * (x - self.loc) ** 2

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        return self.loc + torch.randn(*sample_shape, *self.loc.shape)


@pytest.fixture
def unexpanded_rule():
    """Register a rule with torch for the time of a test."""
    register_kl(Unexpanded, Unexpanded)(lambda q, p: 0.5 * (q.loc - p.loc) ** 2)
    yield
    del _KL_REGISTRY[Unexpanded, Unexpanded]


@pytest.mark.parametrize(("of_q", "of_p"), [((16,), ()), ((), (16,)), ((4, 1), (3,)), ((2,), (2,))])
def test_a_rule_of_torch_is_found_for_a_class_without_expand(unexpanded_rule, of_q, of_p):
    q, p = Unexpanded(torch.ones(of_q)), Unexpanded(torch.zeros(of_p))
    shape = torch.broadcast_shapes(of_q, of_p)
    assert has_closed_form(q, p)
    assert AutoKL().route(q, p) == "closed_form"
    assert torch.equal(kl_divergence(q, p), torch.full(shape, 0.5))
    assert AnalyticKL(batch_dims=2)(q, p) == 0.5


def test_a_class_without_expand_is_sampled_at_its_own_shape_and_refused_by_name_at_another():
    assert MonteCarloKL(8)(Unexpanded(torch.ones(16)), Normal(0.0, 1.0)).isfinite()
    with pytest.raises(NotImplementedError, match=r"Unexpanded has no expand, .* from its batch shape \(\) to \(16,\)"):
        MonteCarloKL(8)(Unexpanded(torch.tensor(1.0)), Normal(torch.zeros(16), 1.0))
    with pytest.raises(NotImplementedError, match="Unexpanded has no expand"):
        AutoKL()(Unexpanded(torch.tensor(1.0)), Normal(torch.zeros(3), 1.0), mask=torch.tensor([1, 0, 1]))


class Truncated(Distribution):
    """A Normal on [-1, 1] that states a support of the caller's choice, as other libraries do."""

    arg_constraints, has_rsample = {}, True

    def __init__(self, loc, scale, stated):
        self.loc, self.scale, self.stated = loc, scale, stated
        super().__init__(loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Truncated(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.stated)

    @property
    def support(self):
        return STATED[self.stated](self)

    def _range(self):
        normal = Normal(self.loc, self.scale)
        return normal, normal.cdf(-torch.ones_like(self.loc)), normal.cdf(torch.ones_like(self.loc))

    def log_prob(self, x):
        normal, low, high = self._range()
        return torch.where(x.abs() > 1, -torch.inf, normal.log_prob(x) - (high - low).log())

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        normal, low, high = self._range()
        u = torch.rand(*sample_shape, *self.loc.shape, dtype=self.loc.dtype)
        return normal.icdf(low + (high - low) * u).clamp(-1, 1)


STATED = {
    "right": lambda d: constraints.interval(-1.0, 1.0),
    "of the standardised variable": lambda d: constraints.interval((-1 - d.loc) / d.scale, (1 - d.loc) / d.scale),
    "too small": lambda d: constraints.interval(-0.5, 0.5),
    "too large": lambda d: constraints.interval(-3.0, 7.0),
    "another": lambda d: constraints.positive,
    "of vectors": lambda d: constraints.simplex,
}


def truncated_kl(q, p):
    """Return the KL on [-1, 1] by a Gauss rule."""
    x, w = (torch.as_tensor(t).unsqueeze(-1) for t in leggauss(60))
    log_q = q.log_prob(x)
    return (w * log_q.exp() * (log_q - p.log_prob(x))).sum(0)


@pytest.mark.parametrize("of_q", STATED)
@pytest.mark.parametrize("of_p", STATED)
def test_a_support_that_draws_leave_is_not_believed(of_q, of_p):
    loc, scale = torch.tensor([0.5, -0.2, 3.0]).double(), torch.tensor([0.3, 2.0, 1.5]).double()
    q, p = Truncated(loc, scale, of_q), Truncated(loc.flip(0), scale + 0.4, of_p)
    torch.manual_seed(0)
    estimate = MonteCarlo(4096).estimate(q, p)
    assert ((estimate.value - truncated_kl(q, p)).abs() < 5 * estimate.std_error).all()
    assert (MonteCarlo(8).estimate(q, q).value == 0).all()
    fallback = AutoKL(fallback=[Quadrature(), MonteCarlo(4096)], reduction="none")(q, p)
    assert ((fallback - truncated_kl(q, p)).abs() < 6 * estimate.std_error + 1e-3).all()
    joint = MonteCarlo(64).estimate(Independent(q, 1), Independent(p, 1)).value
    assert joint.isfinite()


def test_a_right_support_of_another_library_still_makes_a_kl_infinite():
    loc, scale = torch.zeros(3), torch.ones(3)
    for p in (Truncated(loc, scale, "right"), Independent(Truncated(loc, scale, "right"), 1)):
        q = Normal(loc, 0.5)
        q = Independent(q, 1) if isinstance(p, Independent) else q
        assert (MonteCarlo(2).estimate(q, p).value == math.inf).all()


def test_a_check_of_a_support_leaves_the_random_streams_alone():
    loc, scale = torch.zeros(3), torch.ones(3)
    q, p = Truncated(loc, scale, "right"), Truncated(loc + 1, scale, "too large")
    torch.manual_seed(0)
    first = MonteCarlo(8).estimate(q, Normal(loc, scale)).value
    torch.manual_seed(0)
    contained(q, p)
    assert torch.equal(MonteCarlo(8).estimate(q, Normal(loc, scale)).value, first)


class Point(Distribution):
    """All mass on one point, as with a Delta."""

    arg_constraints, support, has_rsample = {}, constraints.real, True

    def __init__(self, at):
        self.at = at
        super().__init__(at.shape, validate_args=False)

    @property
    def variance(self):
        return torch.zeros_like(self.at)

    def expand(self, batch_shape, _instance=None):
        return Point(self.at.expand(batch_shape))

    def log_prob(self, x):
        return (x == self.at).log()

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        return self.at.expand(torch.Size(sample_shape) + self.at.shape)


def test_a_point_has_no_mass_under_a_density_nor_the_reverse():
    point, normal = Point(torch.zeros(3)), Normal(torch.zeros(3), 1.0)
    for q, p in ((point, normal), (normal, point), (Independent(point, 1), Independent(normal, 1))):
        assert (MonteCarlo(4).estimate(q, p).value == math.inf).all()
        assert AutoKL(fallback=[Quadrature(), MonteCarlo(4)])(q, p) == math.inf
