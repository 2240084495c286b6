"""One-line constructors for the distributions that losses are usually about."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributions as dist
from torch.distributions import Independent, Normal

from torch_klloss import AutoKL, categorical, diagonal_normal, kl_divergence, standard_normal_like
from torch_klloss.closed_forms.registry import find_rule
from torch_klloss.distributions.families import LogVarNormal, StandardNormal

SHAPES = [((4, 3), 1), ((4, 2, 3, 3), 1), ((4, 5, 3), 2), ((3,), 0), ((3,), 1), ((), 0)]


@pytest.mark.parametrize(("shape", "batch_dims"), SHAPES)
def test_the_dims_after_the_batch_are_one_event(shape, batch_dims):
    mean, logvar = torch.randn(shape), torch.randn(shape)
    q = diagonal_normal(mean, logvar, batch_dims)
    assert (q.batch_shape, q.event_shape) == (shape[:batch_dims], shape[batch_dims:])
    assert torch.equal(q.mean, mean)
    torch.testing.assert_close(q.variance, logvar.exp())
    assert q.rsample((2,)).shape == (2, *shape)
    x = torch.randn(shape)
    plain = Independent(Normal(mean, (logvar / 2).exp()), len(shape) - batch_dims)
    torch.testing.assert_close(q.log_prob(x), plain.log_prob(x))
    torch.testing.assert_close(q.entropy(), plain.entropy())


@pytest.mark.parametrize(("shape", "batch_dims"), SHAPES)
def test_the_kl_of_a_vae_is_the_formula(shape, batch_dims):
    mean, logvar = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    q = diagonal_normal(mean, logvar, batch_dims)
    p = standard_normal_like(q)
    by_hand = -0.5 * (1 + logvar - mean**2 - logvar.exp())
    by_hand = by_hand.sum(tuple(range(batch_dims, len(shape)))) if len(shape) > batch_dims else by_hand
    for form in (kl_divergence, dist.kl_divergence):
        value = form(q, p)
        torch.testing.assert_close(value, by_hand, rtol=1e-12, atol=1e-12)
        grads = torch.autograd.grad(value.sum(), (mean, logvar))
        expected = torch.autograd.grad(by_hand.sum(), (mean, logvar), retain_graph=True)
        torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(AutoKL(batch_dims=batch_dims)(q, p), by_hand.mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_a_normal_to_every_other_normal(reverse):
    q = diagonal_normal(torch.randn(4, 3), torch.randn(4, 3))
    p = Independent(Normal(torch.zeros(3), 2.0), 1)
    plain = Independent(Normal(q.mean, q.stddev), 1)
    pair, expected = ((p, q), (p, plain)) if reverse else ((q, p), (plain, p))
    torch.testing.assert_close(kl_divergence(*pair), kl_divergence(*expected))
    torch.testing.assert_close(dist.kl_divergence(*pair), kl_divergence(*expected))
    assert AutoKL().route(*pair) == "closed_form"


def test_the_log_variance_is_kept_as_given_through_expand_and_copies():
    logvar = torch.tensor([[1e-8, -200.0, 3.0]])
    q = diagonal_normal(torch.zeros(1, 3), logvar)
    assert q.base_dist.logvar is logvar
    for other in (q.expand((4,)), copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert isinstance(other.base_dist, LogVarNormal)
        assert torch.equal(other.base_dist.logvar, logvar.expand(other.base_dist.batch_shape))
    p = standard_normal_like(q)
    # From the scale, exp(½ 1e-8) in float32, the first would be 0; from -200, the second has lost its logarithm.
    value = kl_divergence(Independent(q.base_dist, 0), Independent(p.base_dist, 0))
    torch.testing.assert_close(value[0, :2], torch.tensor([2.5e-17, 99.5]), rtol=1e-6, atol=0)


def test_log_prob_is_not_overridden():
    assert LogVarNormal.log_prob is StandardNormal.log_prob is Normal.log_prob


def test_validation_is_torchs():
    with pytest.raises(ValueError, match=r"Expected parameter loc .* to satisfy the constraint Real"):
        diagonal_normal(torch.tensor([[0.0, math.nan]]), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"Expected parameter scale .* to satisfy the constraint GreaterThan"):
        diagonal_normal(torch.zeros(1, 2), torch.tensor([[0.0, math.nan]]))
    diagonal_normal(torch.tensor([[math.inf, -math.inf]]), torch.zeros(1, 2))  # real numbers to torch
    assert diagonal_normal(torch.zeros(1, 2), torch.zeros(1, 2)).base_dist._validate_args


def test_shapes_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match=r"the same shape, got \(4, 3\) and \(3,\).*logvar.expand_as\(mean\)"):
        diagonal_normal(torch.zeros(4, 3), torch.zeros(3))
    for batch_dims in (-1, 3):
        with pytest.raises(
            ValueError, match=rf"between 0 and the number of dimensions of mean \(2\), got {batch_dims}"
        ):
            diagonal_normal(torch.zeros(4, 3), torch.zeros(4, 3), batch_dims)


LIKE = [
    diagonal_normal(torch.zeros(4, 3), torch.zeros(4, 3)),
    Normal(torch.zeros(5), 1.0),
    Normal(0.0, 1.0),
    dist.MultivariateNormal(torch.zeros(2, 3), torch.eye(3)),
    Independent(dist.Laplace(torch.zeros(4, 2, 3), 1.0), 2),
    dist.Gamma(torch.ones(4, dtype=torch.float64), 1.0),
    dist.Gumbel(torch.zeros(4), 1.0),
    dist.LogisticNormal(torch.zeros(3), torch.ones(3)),
]


@pytest.mark.parametrize("q", LIKE, ids=lambda q: type(q).__name__)
def test_the_standard_normal_has_the_shape_and_the_dtype_of_q(q):
    p = standard_normal_like(q)
    assert (p.batch_shape, p.event_shape) == (q.batch_shape, q.event_shape)
    assert p.mean.unique().tolist() == [0.0]
    assert p.variance.unique().tolist() == [1.0]
    assert p.sample().dtype == q.sample().dtype
    x = p.sample()
    plain = Independent(Normal(torch.zeros_like(x), 1.0), len(q.event_shape))
    torch.testing.assert_close(p.log_prob(x), plain.log_prob(x))
    assert p.expand((7, *q.batch_shape)).batch_shape == (7, *q.batch_shape)


def test_the_standard_normal_may_come_first():
    q = diagonal_normal(torch.randn(4, 3), torch.randn(4, 3))
    p = standard_normal_like(q)
    expected = dist.kl_divergence(
        Independent(Normal(torch.zeros(4, 3), 1.0), 1), Independent(Normal(q.mean, q.stddev), 1)
    )
    torch.testing.assert_close(kl_divergence(p, q), expected)
    assert kl_divergence(p, p).tolist() == [0.0] * 4


def test_the_pair_of_a_vae_has_a_rule_of_its_own_wherever_it_comes_from():
    q = diagonal_normal(torch.zeros(2, 3), torch.zeros(2, 3))
    p = standard_normal_like(q)
    types = (LogVarNormal, StandardNormal)
    for a, b in ((q, p), (q.expand((5, 2)), p), (q, p.expand((5, 2)))):
        assert find_rule(a.base_dist, b.base_dist).types == types
        assert kl_divergence(a, b).shape == torch.broadcast_shapes(a.batch_shape, b.batch_shape)


def learned(width_of):
    """Return a posterior and a learned prior near it, as leaves in float32 and in float64.

    The prior's width is made of its log-variance.
    """
    mean, logvar = torch.randn(2, 400, 3)
    near = 10.0 ** -torch.arange(8).repeat(50)[:, None]
    leaves = [mean, logvar, mean + near * torch.randn(400, 3), width_of(logvar + near * torch.randn(400, 3))]
    return [[t.to(dtype).requires_grad_() for t in leaves] for dtype in (torch.float32, torch.float64)]


@pytest.mark.parametrize("by_scale", [False, True], ids=["by its log-variance", "by its scale"])
def test_a_learned_prior_has_the_digits_of_the_log_variance_that_was_given(by_scale):
    (mean, logvar, loc, width), wide = learned(lambda logvar: (0.5 * logvar).exp() if by_scale else logvar)
    p = Independent(Normal(loc, width), 1) if by_scale else diagonal_normal(loc, width)
    value = kl_divergence(diagonal_normal(mean, logvar), p)
    found = torch.autograd.grad(value.sum(), (mean, logvar, loc, width))
    log_variance = 2 * wide[3].log() if by_scale else wide[3]
    x = wide[1] - log_variance
    exact = (((wide[0] - wide[2]).square() * torch.exp(-log_variance) + torch.expm1(x) - x) / 2).sum(-1)
    torch.testing.assert_close(value, exact.float(), rtol=1e-6, atol=0)
    for one, other in zip(found, torch.autograd.grad(exact.sum(), wide), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-9)


def test_a_log_variance_may_be_far_beyond_what_a_scale_in_float32_holds():
    logvar = torch.tensor([-1400.0, -800.0, -200.0, 200.0, 2000.0])
    for p in (Normal(torch.zeros(5), torch.ones(5)), diagonal_normal(torch.zeros(5), torch.zeros(5), 1).base_dist):
        value = kl_divergence(LogVarNormal(torch.zeros(5), logvar), p)
        assert value.tolist()[:3] == pytest.approx([699.5, 399.5, 99.5])
        assert value.tolist()[3:] == [math.inf, math.inf]


@pytest.mark.parametrize("wrong", [torch.zeros(3), (3,), None])
def test_like_takes_a_distribution(wrong):
    with pytest.raises(TypeError, match=f"takes a torch.distributions.Distribution, got {type(wrong).__name__}"):
        standard_normal_like(wrong)


LOGITS = torch.tensor([[1.0, 2.0, -1.0], [100.0, 100.5, 99.0]])


def test_a_categorical_keeps_its_logits_raw():
    q, plain = categorical(LOGITS), dist.Categorical(logits=LOGITS)
    assert q.raw_logits is LOGITS
    torch.testing.assert_close(q.logits, plain.logits)
    torch.testing.assert_close(q.probs, plain.probs)
    torch.testing.assert_close(q.log_prob(torch.tensor([0, 2])), plain.log_prob(torch.tensor([0, 2])))
    torch.testing.assert_close(q.entropy(), plain.entropy())
    assert q.param_shape == plain.param_shape
    assert q.sample((5,)).shape == (5, 2)
    assert torch.equal(q.enumerate_support(), plain.enumerate_support())
    expanded = q.expand((4, 2))
    assert (expanded.batch_shape, expanded.raw_logits.shape) == ((4, 2), (4, 2, 3))


def test_a_categorical_is_accepted_wherever_torchs_is():
    q, p = categorical(LOGITS), dist.Categorical(torch.ones(3))
    expected = dist.kl_divergence(dist.Categorical(logits=LOGITS), p)
    for value in (dist.kl_divergence(q, p), kl_divergence(q, p), AutoKL(reduction="none")(q, p)):
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(kl_divergence(p, q), dist.kl_divergence(p, dist.Categorical(logits=LOGITS)))


def test_a_common_offset_of_the_logits_changes_nothing():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    value = kl_divergence(categorical(logits), categorical(logits + 7.0))
    torch.testing.assert_close(value, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_masked_class_has_no_probability():
    q = categorical(torch.tensor([0.0, 0.0, -math.inf]))
    assert q.probs.tolist() == [0.5, 0.5, 0.0]
    assert kl_divergence(q, categorical(torch.zeros(3))).item() == pytest.approx(math.log(1.5))


def test_an_empty_batch_is_a_batch():
    q = categorical(torch.zeros(0, 3))
    assert kl_divergence(q, categorical(torch.zeros(3))).shape == (0,)
    empty = diagonal_normal(torch.zeros(0, 3), torch.zeros(0, 3))
    assert AutoKL(reduction="sum")(empty, standard_normal_like(empty)) == 0


def test_bad_logits_are_errors():
    with pytest.raises(ValueError, match=r"at least one class in its last dimension, got shape \(\)"):
        categorical(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"at least one class in its last dimension, got shape \(3, 0\)"):
        categorical(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"Expected parameter raw_logits .* to satisfy the constraint"):
        categorical(torch.tensor([0.0, math.nan]))
