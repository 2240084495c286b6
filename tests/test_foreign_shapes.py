"""Classes whose points, densities or rules have other shapes than their parents' or than torch's."""

import math

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Categorical,
    Distribution,
    ExpTransform,
    Independent,
    MultivariateNormal,
    Normal,
    StackTransform,
    TransformedDistribution,
    constraints,
    register_kl,
)
from torch.distributions.kl import _KL_REGISTRY
from torch.distributions.kl import kl_divergence as torchs_kl

from torch_klloss import (
    AnalyticKL,
    AutoKL,
    ELBOLoss,
    KLLoss,
    MonteCarloKL,
    QuadratureKL,
    has_closed_form,
    kl_divergence,
)
from torch_klloss import register_kl as register_ours
from torch_klloss.closed_forms.registry import _RULES
from torch_klloss.elbo import IWAELoss
from torch_klloss.methods import ClosedForm, Enumeration, FirstOf, MonteCarlo, Quadrature


@pytest.fixture
def rules():
    """Forget the rules that a test registers, with torch or with this library."""
    ours, torchs = dict(_RULES), dict(_KL_REGISTRY)
    yield
    for table, before in ((_RULES, ours), (_KL_REGISTRY, torchs)):
        table.clear()
        table.update(before)


# Points in another form than the parent's, for which torch's kl_divergence has the parent's rule


class Multitask(MultivariateNormal):
    """A MultivariateNormal over the entries of a matrix, as GPyTorch has it."""

    def __init__(self, mean, covariance):
        super().__init__(mean.flatten(-2), covariance, validate_args=False)
        self._event_shape = mean.shape[-2:]

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        shape = torch.Size(sample_shape)
        flat = self.loc + (self._unbroadcasted_scale_tril @ torch.randn(*shape, *self.loc.shape, 1)).squeeze(-1)
        return flat.unflatten(-1, self._event_shape)

    def log_prob(self, value):
        return MultivariateNormal(self.loc, scale_tril=self._unbroadcasted_scale_tril).log_prob(value.flatten(-2))


class OneHot(Categorical):
    """A Categorical whose points are one-hot vectors, with an event shape of (), as TorchRL has it."""

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return torch.nn.functional.one_hot(super().sample(sample_shape), self.logits.shape[-1])

    def log_prob(self, value):
        return super().log_prob(value.argmax(-1))


class OneDraw(Categorical):
    """A Categorical whose log_prob takes one draw at a time, as TorchRL's masked one does."""

    def log_prob(self, value):
        logits = self.logits.reshape(-1, self.logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(logits, value.long().reshape(-1), reduction="none")
        return -loss.view(value.shape)


def of_form(name, shift, batch=(3,)):
    generator = torch.Generator().manual_seed(int(10 * shift))
    if name == "Multitask":
        root = torch.randn(*batch, 6, 6, generator=generator)
        return Multitask(torch.randn(*batch, 2, 3, generator=generator) + shift, root @ root.mT + torch.eye(6))
    logits = torch.randn(*batch, 4, generator=generator)
    logits[..., 1] = -math.inf if name == "masked" else 0.0
    return {"OneHot": OneHot, "OneDraw": OneDraw, "masked": OneDraw}[name](logits=logits, validate_args=False)


@pytest.mark.parametrize("batch", [(), (3,), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", ["Multitask", "OneHot", "OneDraw", "masked"])
def test_the_losses_take_the_closed_form_that_the_exact_function_has(name, batch):
    q, p = of_form(name, 0.0, batch), of_form(name, 1.0, batch)
    expected = kl_divergence(q, p)
    assert expected.isfinite().all()
    flat = [MultivariateNormal(d.loc, scale_tril=d._unbroadcasted_scale_tril) for d in (q, p) if name == "Multitask"]
    torch.testing.assert_close(expected, torchs_kl(*(flat or (q, p))))
    loss = AutoKL(fallback=[Quadrature(), MonteCarlo(8)], reduction="none", batch_dims=2)
    assert has_closed_form(q, p)
    assert loss.route(q, p) == "closed_form"
    assert torch.equal(loss(q, p), expected)


@pytest.mark.parametrize("name", ["OneHot", "OneDraw"])
def test_a_sum_over_points_that_a_class_does_not_take_is_refused_by_name(name):
    q, p = of_form(name, 0.0), of_form(name, 1.0)
    with pytest.raises(NotImplementedError, match=rf"Enumeration cannot evaluate {name}\.log_prob at the points"):
        Enumeration().estimate(q, p)
    assert FirstOf(Enumeration(), ClosedForm()).estimate(q, p).method == "closed_form"


def test_draws_of_undeclared_form_are_sampled_and_those_that_fail_are_refused_by_name():
    q, p = of_form("OneHot", 0.0), of_form("OneHot", 1.0)
    error = MonteCarloKL(4096, reduction="none").estimate(q, p)
    assert ((error.value - kl_divergence(q, p)).abs() < 6 * error.std_error).all()
    with pytest.raises(ValueError, match=r"OneDraw\.log_prob fails at points of shape \(4096, 3\)"):
        MonteCarloKL(4096)(of_form("OneDraw", 0.0), of_form("OneDraw", 1.0))


def test_a_categorical_gets_the_integers_that_it_draws():
    class Strict(Categorical):
        def log_prob(self, value):
            assert not value.is_floating_point()
            return super().log_prob(value)

    q, p = Strict(torch.ones(3)), Strict(torch.tensor([1.0, 2.0, 3.0]))
    assert MonteCarloKL(4)(q, p).isfinite()
    assert MonteCarloKL(4)(Independent(q.expand((2,)), 1), Independent(p.expand((2,)), 1)).isfinite()


# log_prob of another shape than the points and the batch


class Wrong(Distribution):
    """A standard Normal whose log_prob has too many or too few dimensions."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real
    has_rsample = True

    def __init__(self, batch=(2, 3), event=(), change="sum", readable=True):
        self.change, self.readable = change, readable
        super().__init__(torch.Size(batch), torch.Size(event), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Wrong(batch_shape, self.event_shape, self.change)

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        return torch.randn(*sample_shape, *self.batch_shape, *self.event_shape)

    def log_prob(self, value):
        log_prob = Normal(0.0, 1.0).log_prob(value)
        if self.change == "sum":
            return log_prob.sum(-1)
        if self.change == "keep":
            return log_prob.sum(-1, keepdim=True)
        if self.change == "all":
            return log_prob.sum()
        return log_prob  # not summed over the event


WRONG = {
    "sums over a batch dimension": ((2, 3), (), "sum"),
    "over one of as many": ((3, 3), (), "sum"),
    "keeps it": ((2, 3), (), "keep"),
    "over everything": ((2, 3), (), "all"),
    "sums over nothing": ((), (2,), "none"),
    "nothing of two": ((2,), (2,), "none"),
}
METHODS = {
    "auto": AutoKL(batch_dims=2),
    "sampled": MonteCarloKL(2, batch_dims=2),
    "chunks": MonteCarloKL(5, chunk_size=2, batch_dims=2),
    "sticking": MonteCarloKL(3, gradient="sticking_the_landing", batch_dims=2),
    "score": MonteCarloKL(4, gradient="score_function", batch_dims=2),
    "none": MonteCarloKL(2, gradient="none", batch_dims=2),
    "k3": MonteCarloKL(32, value="k3", batch_dims=2),
    "quadrature": KLLoss(FirstOf(Quadrature(), MonteCarlo(3)), batch_dims=2),
}


@pytest.mark.parametrize("swap", [False, True], ids=["as q", "as p"])
@pytest.mark.parametrize("loss", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", WRONG.values(), ids=WRONG)
def test_a_log_prob_of_another_shape_is_an_error_that_names_it(kind, loss, swap):
    batch, event, _ = kind
    q, p = Wrong(*kind), Independent(Normal(torch.zeros(batch + event), 2.0), len(event))
    q, p = (p, q) if swap else (q, p)
    with pytest.raises(ValueError, match=r"Wrong\.log_prob must return one number for each point and batch element"):
        loss(q, p)


@pytest.mark.parametrize("method", ["control_variate", "taylor"])
@pytest.mark.parametrize("kind", WRONG.values(), ids=WRONG)
def test_the_same_of_a_p_whose_derivatives_are_taken(kind, method):
    batch, event, _ = kind
    q = Independent(Normal(torch.zeros(batch + event), 2.0), len(event))
    with pytest.raises(ValueError, match=r"Wrong\.log_prob must return"):
        MonteCarloKL(8, value=method)(q, Wrong(*kind))
    with pytest.raises(ValueError, match=r"Wrong\.log_prob must return"):
        MonteCarloKL(8, gradient="mixed")(q, Wrong(*kind))


@pytest.mark.parametrize("kind", [WRONG["sums over a batch dimension"], WRONG["nothing of two"]], ids=str)
def test_the_same_of_the_losses_of_a_vae(kind):
    batch, event, _ = kind
    wrong, normal = Wrong(*kind), Independent(Normal(torch.zeros(batch + event), 2.0), len(event))
    match = r"Wrong\.log_prob must return"
    with pytest.raises(ValueError, match=match):
        IWAELoss(4)(lambda z: normal.expand((4, *batch)), torch.zeros(batch + event), wrong, normal)
    with pytest.raises(ValueError, match=match):
        IWAELoss(4)(lambda z: wrong.expand((4, *batch)), torch.zeros(batch + event), normal, normal)
    with pytest.raises(ValueError, match=match):
        ELBOLoss()(wrong, torch.zeros(batch + event), normal, normal)


def test_an_overridden_log_prob_of_another_shape_is_not_compared_but_refused():
    class Summed(Normal):
        def log_prob(self, value):
            return super().log_prob(value).sum(-1)

    q = Summed(torch.ones(2, 3), 1.0)
    for pair in ((q, Normal(0.0, 1.0)), (Normal(0.0, 1.0), q)):
        with pytest.raises(ValueError, match=r"Summed\.log_prob must return"):
            AutoKL()(*pair)


def stacked(mean, std):
    parts = [AffineTransform(1.0, 2.0), ExpTransform()]
    return TransformedDistribution(Normal(mean, std), [StackTransform(parts, -1)])


def test_torchs_stack_whose_log_prob_has_the_shape_of_the_event_is_right():
    q, p = stacked(torch.zeros(2), torch.ones(2)), stacked(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0]))
    exact = torchs_kl(Normal(torch.zeros(2), 1.0), Normal(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0]))).sum()
    assert AutoKL().route(q, p) == "closed_form"
    for loss in (AutoKL(), AnalyticKL(), AutoKL(fallback=[Quadrature(), MonteCarlo(4)])):
        torch.testing.assert_close(loss(q, p), exact)
    estimate = MonteCarloKL(4096).estimate(q, p)
    assert estimate.value.shape == ()
    assert abs(estimate.value - exact) < 6 * estimate.std_error


@pytest.mark.parametrize(
    ("rule", "got"),
    [
        (lambda q, p: (q.loc - p.loc).sum(), r"\(\)"),
        (lambda q, p: (q.loc - p.loc).sum(-1), r"\(2,\)"),
        (lambda q, p: (q.loc - p.loc).unsqueeze(0), r"\(1, 2, 3\)"),
    ],
    ids=["everything", "a dimension", "one more"],
)
@pytest.mark.parametrize("register", [register_kl, register_ours], ids=["torch", "ours"])
@pytest.mark.parametrize("independent", [False, True])
def test_a_rule_that_returns_another_shape_is_an_error_that_names_it(rules, rule, got, register, independent):
    Sub = type("Sub", (Normal,), {})
    register(Sub, Sub)(rule)
    q, p = Sub(torch.ones(2, 3), 1.0), Sub(torch.zeros(2, 3), 1.0)
    if independent:
        q, p = Independent(q, 1), Independent(p, 1)
    with pytest.raises(ValueError, match=rf"KL\(Sub‖Sub\) must return the broadcast batch shape \(2, 3\), got {got}"):
        AutoKL()(q, p)
    with pytest.raises(ValueError, match="must return the broadcast batch shape"):
        kl_divergence(q, p)


# A tie between the tables


def only_for_deltas(q, p):
    """Stand for Pyro's rule: of a point mass in an Independent."""
    if not isinstance(q.base_dist, Atom):
        raise NotImplementedError
    return -p.log_prob(q.base_dist.point)


class Atom(Distribution):
    """A point mass whose log_prob is infinite at its point."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real

    def __init__(self, point, has_rsample=False):
        self.point, self.has_rsample = point, has_rsample
        super().__init__(point.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Atom(self.point.expand(batch_shape), self.has_rsample)

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        return self.point.expand(*sample_shape, *self.batch_shape)

    sample = rsample

    def log_prob(self, value):
        return torch.where(value == self.point, math.inf, -math.inf)


def test_a_rule_without_a_formula_for_these_instances_yields_to_the_one_of_another_library(rules):
    register_kl(Independent, MultivariateNormal)(only_for_deltas)
    p = MultivariateNormal(torch.ones(3), torch.eye(3))
    q = Independent(Atom(torch.zeros(2, 3)), 1)
    expected = -p.log_prob(torch.zeros(2, 3))
    assert has_closed_form(q, p)
    assert AutoKL().route(q, p) == "closed_form"
    assert torch.equal(kl_divergence(q, p), expected)
    assert torch.equal(AutoKL(reduction="none")(q, p), expected)
    normal = Independent(Normal(torch.zeros(2, 3), 1.0), 1)  # our own rule has the formula for these
    torch.testing.assert_close(kl_divergence(normal, p), torch.full((2,), 1.5))
    with pytest.raises(NotImplementedError, match="No closed form is registered"):
        kl_divergence(Independent(Wrong((3,)), 1), p)


def test_a_pair_that_structure_leads_nowhere_yields_as_well(rules):
    register_kl(TransformedDistribution, Distribution)(lambda q, p: torch.full(q.batch_shape, 7.0))
    q = TransformedDistribution(
        Normal(torch.zeros(3), 1.0), [ExpTransform(), AffineTransform(1.0, 2.0), ExpTransform()]
    )
    p = Normal(torch.zeros(3), 1.0)
    assert AutoKL().route(q, p) == "closed_form"
    assert kl_divergence(q, p).tolist() == [7.0] * 3
    affine = TransformedDistribution(Normal(torch.zeros(3), 1.0), [AffineTransform(1.0, 1.0)])
    torch.testing.assert_close(kl_divergence(affine, p), torch.full((3,), 0.5))


@pytest.mark.parametrize("supports", [False, True])
def test_the_refusal_of_our_own_table_yields_and_its_formula_does_not(rules, supports):
    Sub = type("Sub", (Normal,), {})

    @register_ours(Sub, Sub, supports=lambda q, p: supports)
    def ours(q, p):
        if not supports:
            raise NotImplementedError("only on Sundays")
        return torch.zeros(q.batch_shape)

    q = Sub(torch.zeros(3), 1.0)
    if not supports:
        assert not has_closed_form(q, q)
    register_kl(Sub, Sub)(lambda q, p: torch.ones(q.batch_shape))
    assert has_closed_form(q, q)
    assert kl_divergence(q, q).tolist() == [0.0 if supports else 1.0] * 3


@pytest.mark.parametrize("has_rsample", [False, True])
@pytest.mark.parametrize("gradient", ["auto", "score_function", "none"])
def test_a_point_mass_against_a_density_is_infinite(gradient, has_rsample):
    q, p = Atom(torch.zeros(4), has_rsample), Normal(torch.zeros(4), 1.0)
    assert MonteCarloKL(3, gradient=gradient, reduction="none")(q, p).tolist() == [math.inf] * 4
    assert MonteCarloKL(3, gradient=gradient, reduction="none")(p, q).tolist() == [math.inf] * 4
    assert AutoKL()(q, p) == math.inf


def test_a_point_mass_is_refused_by_quadrature_or_infinite():
    with pytest.raises(ValueError, match="Quadrature"):
        QuadratureKL()(Atom(torch.zeros(4)), Normal(0.0, 1.0))
    assert AutoKL(fallback=[Quadrature(), MonteCarlo(4)])(Atom(torch.zeros(4)), Normal(0.0, 1.0)) == math.inf


def test_a_rule_for_an_abstract_class_of_another_library_is_inherited(rules):
    class Theirs:
        """A mixin without a density, as Pyro's Distribution is."""

        def log_prob(self, value):
            raise NotImplementedError

    class Sub(Normal, Theirs):
        def log_prob(self, value):
            return super().log_prob(value)

    _KL_REGISTRY[Atom, Theirs] = lambda q, p: -p.log_prob(q.point)
    q, p = Atom(torch.zeros(3)), Sub(torch.zeros(3), 1.0)
    assert AutoKL().route(q, p) == "closed_form"
    assert torch.equal(AutoKL(reduction="none")(q, p), -p.log_prob(torch.zeros(3)))
