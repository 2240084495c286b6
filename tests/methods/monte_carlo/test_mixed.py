"""gradient="mixed": its memory, what it refuses, and that it beats what it mixes. Elsewhere it is proved unbiased."""

import copy
import pickle

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    Gamma,
    Gumbel,
    Independent,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
    TransformedDistribution,
    Uniform,
    VonMises,
)

from torch_klloss import AnalyticKL, MonteCarloKL
from torch_klloss.methods import MonteCarlo
from torch_klloss.methods.monte_carlo.mixed import MixedGradient

STANDARD = Normal(0.0, 1.0)
F64 = torch.float64


def q_of(*batch):
    return Normal(torch.full(batch, 0.7, requires_grad=True), torch.full(batch, 0.6, requires_grad=True))


def test_the_memory_is_part_of_the_state_dict_and_comes_back_before_the_first_step():
    loss = MonteCarloKL(8, gradient=MixedGradient())
    loss(q_of(16, 4), StudentT(4.0))
    other = MonteCarloKL(8, gradient=MixedGradient())
    other.load_state_dict(loss.state_dict())
    for theirs, ours in zip(other.mixture.moments, loss.mixture.moments, strict=True):
        assert torch.equal(theirs, ours)
    assert [tuple(m.shape) for m in loss.mixture.moments] == [(4, 2, 3), (4, 2, 3)]  # the examples are pooled


def test_a_loss_without_a_memory_has_no_state():
    assert not MonteCarloKL(8, gradient="mixed").state_dict()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_remembers_on_its_own(copied):
    loss = MonteCarloKL(8, gradient=MixedGradient())
    loss(q_of(16, 4), STANDARD)
    twin = copied(loss)
    assert twin.method.gradient is twin.mixture is not loss.mixture
    before = [m.clone() for m in loss.mixture.moments]
    twin(q_of(16, 4), StudentT(2.0))
    assert all(torch.equal(a, b) for a, b in zip(before, loss.mixture.moments, strict=True))


def test_nothing_is_remembered_in_evaluation_mode_or_without_a_gradient():
    loss = MonteCarloKL(8, gradient=MixedGradient())
    with torch.no_grad():
        loss(q_of(16, 4), STANDARD)
    loss.eval()
    loss(q_of(16, 4), STANDARD)
    assert loss.mixture.moments == []


def test_a_step_of_nan_is_not_remembered():
    loss = MonteCarloKL(8, gradient=MixedGradient())
    q = Normal(torch.tensor([[torch.nan]], requires_grad=True), 1.0, validate_args=False)
    assert loss(q, STANDARD).isnan()
    assert loss.mixture.moments == []


def test_other_parameters_of_q_begin_anew():
    loss = MonteCarloKL(8, gradient=MixedGradient())
    for q in (q_of(16, 4), q_of(16, 5), q_of(3, 5)):
        loss(q, STANDARD).backward()
    assert [tuple(m.shape) for m in loss.mixture.moments] == [(5, 2, 3), (5, 2, 3)]


TARGETS = {
    "Normal": (Normal, (0.7, 0.6), StudentT(torch.tensor(4.0, dtype=F64))),
    "Laplace": (Laplace, (0.5, 0.7), STANDARD),
    "Gamma": (Gamma, (2.0, 1.5), Gamma(torch.tensor(3.0, dtype=F64), 1.0)),
    "Beta": (Beta, (2.0, 1.5), Beta(torch.tensor(3.0, dtype=F64), 1.0)),
    "StudentT": (StudentT, (8.0, 0.3, 1.2), StudentT(torch.tensor(4.0, dtype=F64))),
    "LogNormal": (LogNormal, (0.2, 0.5), LogNormal(torch.tensor(0.0, dtype=F64), 1.0)),
}


def gradients(method, family, raw, p, batch):
    leaves = [torch.full((1, batch), value, dtype=F64).requires_grad_() for value in raw]
    value = method.estimate(family(*leaves), p).value
    return torch.stack([g[0] for g in torch.autograd.grad(value.sum(), leaves)], -1)


@pytest.mark.parametrize(("family", "raw", "p"), TARGETS.values(), ids=TARGETS)
def test_after_fifty_steps_it_spreads_less_than_what_it_mixes_and_agrees_with_it(family, raw, p):
    batch = 150  # columns that remember on their own
    remembering = MonteCarlo(64, gradient=MixedGradient())
    for _ in range(50):
        of = {"mixed": gradients(remembering, family, raw, p, batch)}
    for word in ("pathwise", "sticking_the_landing"):
        of[word] = gradients(MonteCarlo(64, gradient=word), family, raw, p, batch)
    reference = of["sticking_the_landing"]
    error = ((of["mixed"].var(0) + reference.var(0)) / batch).sqrt()
    assert ((of["mixed"].mean(0) - reference.mean(0)).abs() < 6 * error + 3e-4).all()  # torch's implicit derivative
    best = min(of[word].var(0).sum() for word in ("pathwise", "sticking_the_landing"))
    assert of["mixed"].var(0).sum() < 1.1 * best


@pytest.mark.parametrize(("loc", "scale"), [(0.1, 0.99), (1.5, 0.3)], ids=["near p", "far from p"])
def test_without_a_memory_it_is_as_good_where_either_is_best(loc, scale):
    spread = {
        word: gradients(MonteCarlo(64, gradient=word), Normal, (loc, scale), STANDARD, 400).var(0).sum()
        for word in ("pathwise", "sticking_the_landing", "mixed")
    }
    assert spread.pop("mixed") < 1.1 * min(spread.values())


def test_mixtures_and_vectors_have_mixed_gradients_too():
    logits = torch.zeros(5, 2, requires_grad=True)
    loc = torch.zeros(5, 2, 3, requires_grad=True)
    q = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(loc, 1.0), 1))
    matrix = MultivariateNormal(loc[:, 0], torch.eye(3))
    simplex = Dirichlet(torch.ones(5, 3, requires_grad=True))
    for each, p in ((q, matrix), (matrix, q), (simplex, Dirichlet(torch.full((3,), 2.0)))):
        value = MonteCarlo(8, gradient="mixed").estimate(each, p).value
        assert value.shape == (5,)
        assert value.requires_grad


def test_p_gets_its_gradient_and_q_gets_the_value_of_the_plain_mean():
    q, loc = q_of(3), torch.zeros(3, requires_grad=True)
    estimate = MonteCarlo(2000, gradient="mixed").estimate(q, Normal(loc, 1.0))
    grads = torch.autograd.grad(estimate.value.sum(), (q.loc, q.scale, loc))
    exact = torch.autograd.grad(3 * AnalyticKL()(q, Normal(loc, 1.0)), (q.loc, q.scale, loc))
    for actual, expected, tolerance in zip(grads, exact, (1e-3, 1e-3, 6 * 0.6 / 2000**0.5), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    assert estimate.dof == 1999
    kl = AnalyticKL(reduction="none")(q, STANDARD)
    assert ((estimate.value - kl).abs() < 6 * estimate.std_error).all()


@pytest.mark.parametrize(
    "q",
    [
        Gumbel(torch.zeros(3), 1.0),
        TransformedDistribution(STANDARD, [AffineTransform(torch.zeros(3, requires_grad=True), 1.0)]),
    ],
    ids=["Gumbel", "affine"],
)
def test_a_family_whose_scores_are_not_known_is_refused(q):
    method = MonteCarlo(8, gradient="mixed")
    assert not method.supports(q, q)
    with pytest.raises(NotImplementedError, match=r"knows the scores of Normal, Laplace, .*use gradient='pathwise'"):
        method.estimate(q, q)


def test_what_has_no_path_or_a_moving_support_is_refused():
    with pytest.raises(NotImplementedError, match=r"needs q\.rsample"):
        MonteCarlo(8, gradient="mixed").estimate(VonMises(0.0, 1.0), VonMises(0.0, 1.0))
    with pytest.raises(NotImplementedError, match="support moves with its parameters"):
        MonteCarlo(8, gradient="mixed").estimate(Uniform(0.0, torch.ones((), requires_grad=True)), STANDARD)


def test_too_few_draws_and_chunks_are_refused():
    with pytest.raises(ValueError, match=r"at least 8 .* or of 2 with gradient=MixedGradient\(\).* got 7"):
        MonteCarlo(7, gradient="mixed")
    with pytest.raises(ValueError, match="got 1"):
        MonteCarlo(1, gradient=MixedGradient())
    with pytest.raises(ValueError, match="use chunk_size=None"):
        MonteCarlo(8, gradient="mixed", chunk_size=4)
    with pytest.raises(ValueError, match=r"decay must lie strictly between 0 and 1, got 1\.0"):
        MixedGradient(1.0)


class Moved(Normal):
    """A Normal that a network moves: its loc is none of its tensors."""

    def __init__(self, shift, loc, scale):
        self.shift = shift
        super().__init__(loc, scale, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(Moved, _instance)
        new.shift = self.shift
        return super().expand(batch_shape, new)

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape) + self.shift()

    def log_prob(self, value):
        return super().log_prob(value - self.shift())


class Computed(Normal):
    """A Normal without tensors."""

    def __init__(self, parameters, batch_shape):
        self.parameters = parameters
        Distribution.__init__(self, batch_shape, validate_args=False)

    loc = property(lambda self: self.parameters()[0].expand(self.batch_shape))
    scale = property(lambda self: self.parameters()[1].expand(self.batch_shape))

    def expand(self, batch_shape, _instance=None):
        return Computed(self.parameters, torch.Size(batch_shape))


class Detached(Moved):
    """The same with draws that carry no gradient to the network."""

    def expand(self, batch_shape, _instance=None):
        return Detached(self.shift, self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def rsample(self, sample_shape=()):
        return Normal.rsample(self, sample_shape) + self.shift().detach()


HIDDEN = {
    "beside its tensors": lambda t, one: Moved(lambda: t, 0 * one, one),
    "beside tensors that learn": lambda t, one: Moved(lambda: t, (0 * one).requires_grad_(), one.requires_grad_()),
    "without tensors": lambda t, one: Computed(lambda: (t, one[:1]), one.shape),
    "in a component": lambda t, one: MixtureSameFamily(
        Categorical(logits=torch.zeros(len(one), 2, dtype=F64)),
        Moved(lambda: t, torch.zeros(len(one), 2, dtype=F64), torch.ones(len(one), 2, dtype=F64)),
    ),
}


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("name", HIDDEN)
def test_parameters_that_no_tensor_shows_get_their_gradient(name, memory):
    n = 20_000
    t, one = torch.tensor(0.7, dtype=F64, requires_grad=True), torch.ones(n, dtype=F64)
    p = Normal(torch.tensor(0.3, dtype=F64), 1.5)
    torch.manual_seed(0)
    method = MonteCarlo(16, gradient=MixedGradient() if memory else "mixed")
    value = method.estimate(HIDDEN[name](t, one), p).value.mean()
    (found,) = torch.autograd.grad(value, t)
    spread = 1 / 1.5**2 / (16 * n) ** 0.5  # of the pathwise gradient (t + noise - 0.3) / 1.5²
    assert abs(found - 0.4 / 1.5**2) < 5 * spread


@pytest.mark.parametrize("mixture", [False, True])
def test_draws_without_a_path_are_refused(mixture):
    t, zero = torch.tensor(0.7, dtype=F64, requires_grad=True), torch.zeros(3, 2, dtype=F64)
    q = Detached(lambda: t, zero, zero + 1)
    if mixture:
        q = MixtureSameFamily(Categorical(logits=zero), q)
    with pytest.raises(NotImplementedError, match=r"draws of q\.rsample that carry a gradient to every parameter"):
        MonteCarlo(8, gradient="mixed").estimate(q, Normal(torch.tensor(0.3, dtype=F64), 1.5))
