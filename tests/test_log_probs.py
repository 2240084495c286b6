"""`kl_from_log_probs`: values and gradients over all draws of a finite support, masks, sequences, errors."""

import itertools
import math
import re
import warnings
from typing import get_args

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from torch_klloss import AutoKL, kl_from_log_probs
from torch_klloss.log_probs import Level, LogProbGradient, LogProbValue
from torch_klloss.methods.monte_carlo.tail_diagnostics import HeavyTailWarning

Q, P = Normal(1.0, 1.0), Normal(0.0, 1.0)


def test_the_value_is_the_kl_and_the_questions_line_is_not():
    x = Q.icdf((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    log_q, log_p = Q.log_prob(x), P.log_prob(x)
    assert abs(kl_from_log_probs(log_q, log_p) - 0.5) < 1e-5  # log q - log p = x - ½ is linear; its tails are cut
    assert abs((log_q.exp() * (log_q - log_p)).mean() - 0.5) > 0.3


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_samples_lie_along_dim(dim):
    log_q, log_p = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(kl_from_log_probs(log_q, log_p, dim=dim), (log_q - log_p).mean(dim))


# The gradient, over every draw of a finite support: the expectation is exact.

Q_LOGITS = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
P_LOGITS = torch.tensor([-0.5, 0.4, 0.2], dtype=torch.float64)


def expected_gradients(gradient: str | None, num_samples: int, dim: int = 0):
    draws = torch.tensor(list(itertools.product(range(3), repeat=num_samples))).T
    q_logits, p_logits = (each.expand(draws.shape[1], -1).clone().requires_grad_() for each in (Q_LOGITS, P_LOGITS))
    q, p = Categorical(logits=q_logits), Categorical(logits=p_logits)
    log_q, log_p = q.log_prob(draws).movedim(0, dim), p.log_prob(draws).movedim(0, dim)
    weights = q.log_prob(draws).detach().sum(0).exp()
    value = (weights * kl_from_log_probs(log_q, log_p, dim=dim, gradient=gradient)).sum()
    if not value.requires_grad:
        return value, None, None
    return value, *(grad.sum(0) for grad in torch.autograd.grad(value, (q_logits, p_logits)))


@pytest.mark.parametrize(("num_samples", "dim"), [(1, 0), (2, 0), (3, 0), (2, 1), (2, -1)])
def test_the_score_function_is_unbiased_over_all_draws(num_samples, dim):
    q_logits, p_logits = (each.clone().requires_grad_() for each in (Q_LOGITS, P_LOGITS))
    exact = kl_divergence(Categorical(logits=q_logits), Categorical(logits=p_logits))
    value, *grads = expected_gradients("score_function", num_samples, dim)
    torch.testing.assert_close(value, exact, rtol=0, atol=1e-13)
    for actual, expected in zip(grads, torch.autograd.grad(exact, (q_logits, p_logits)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_the_mean_of_detached_samples_has_a_gradient_of_zero():
    value, by_q, _ = expected_gradients("pathwise", 2)  # which these samples are not
    torch.testing.assert_close(by_q, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-13)
    assert value > 0.1


def test_pathwise_is_the_gradient_of_the_mean():
    loc = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    q, noise = Normal(loc, 1.0), torch.randn(64, dtype=torch.float64)
    x = loc + noise
    (grad,) = torch.autograd.grad(kl_from_log_probs(q.log_prob(x), P.log_prob(x), gradient="pathwise"), loc)
    torch.testing.assert_close(grad, x.mean())  # log q is constant along the path, and -log p falls by x


def test_gradient_none_gives_the_value_alone():
    log_q, log_p = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    value = kl_from_log_probs(log_q, log_p, gradient="none")
    assert not value.requires_grad
    torch.testing.assert_close(value, (log_q - log_p).mean().detach())


def test_a_fixed_q_needs_no_gradient_option_and_p_gets_its_gradient():
    log_q, log_p = torch.randn(4), torch.randn(4, requires_grad=True)
    (grad,) = torch.autograd.grad(kl_from_log_probs(log_q, log_p), log_p)
    assert grad.tolist() == [-0.25] * 4


def test_a_gradient_in_log_q_needs_the_gradient_option():
    log_q = torch.randn(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"(?s)gradient='pathwise'.*gradient='score_function'.*gradient='none'.*zero"):
        kl_from_log_probs(log_q, torch.randn(4))
    with torch.no_grad():
        kl_from_log_probs(log_q.detach(), torch.randn(4))


def test_bad_input_is_an_error_that_says_what_came():
    with pytest.raises(ValueError, match=r"the same shape, got \(4, 3\) and \(4,\): sum both over the event"):
        kl_from_log_probs(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"at least one sample along dim=0, got shape \(\)"):
        kl_from_log_probs(torch.zeros(()), torch.zeros(()))
    with pytest.raises(ValueError, match=r"at least one sample along dim=1, got shape \(3, 0\)"):
        kl_from_log_probs(torch.zeros(3, 0), torch.zeros(3, 0), dim=1)
    with pytest.raises(
        ValueError, match="gradient must be 'pathwise', 'score_function', 'k2' or 'none', got 'reinforce'"
    ):
        kl_from_log_probs(torch.zeros(3), torch.zeros(3), gradient="reinforce")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    log_q, log_p = torch.full((4096,), 1.0, dtype=dtype), torch.full((4096,), 0.75, dtype=dtype)
    value = kl_from_log_probs(log_q, log_p)
    assert (value.dtype, value.item()) == (torch.float32, 0.25)


def test_infinite_ratios_are_infinite_and_leave_no_nan_in_the_gradient():
    log_q = torch.tensor([-1.0, -2.0], requires_grad=True)
    log_p = torch.tensor([-1.5, -torch.inf])
    value = kl_from_log_probs(log_q, log_p, gradient="score_function")
    assert value == torch.inf
    assert torch.autograd.grad(value, log_q)[0].isfinite().all()


# Value and gradient, chosen apart. All draws of a finite support, from q or from another distribution.

B_LOGITS = torch.tensor([0.1, 0.5, -0.3], dtype=torch.float64)
WORDS = itertools.product(get_args(LogProbValue), get_args(LogProbGradient))
SAMPLED = [(value, gradient) for value, gradient in WORDS if gradient != "pathwise"]


def moments(value, weights, q_logits, p_logits):
    mean = (weights * value).sum()
    if not mean.requires_grad:
        return mean, torch.zeros(q_logits.shape[1:]).double(), torch.zeros(p_logits.shape[1:]).double()
    return mean.detach(), *(g.sum(0) for g in torch.autograd.grad(mean, (q_logits, p_logits)))


def over_all_draws(num_samples=2, off_policy=False, **options):
    draws = torch.tensor(list(itertools.product(range(3), repeat=num_samples))).T
    raw = [each.expand(draws.shape[1], -1).clone().requires_grad_() for each in (Q_LOGITS, P_LOGITS)]
    q, p, b = Categorical(logits=raw[0]), Categorical(logits=raw[1]), Categorical(logits=B_LOGITS)
    source = b if off_policy else q
    if off_policy:
        options["log_behavior"] = b.log_prob(draws)
    weights = source.log_prob(draws).detach().sum(0).exp()
    return moments(kl_from_log_probs(q.log_prob(draws), p.log_prob(draws), **options), weights, *raw)


def exact_moments(value="k1", gradient="score_function"):
    raw = [each.clone().requires_grad_() for each in (Q_LOGITS, P_LOGITS)]
    q, p = (Categorical(logits=each) for each in raw)
    kl = kl_divergence(q, p)
    by_q, by_p = torch.autograd.grad(kl, raw)
    if value == "k2":
        kl = (q.probs * (q.logits - p.logits) ** 2).sum() / 2
    return (kl.detach(), by_q, by_p) if gradient != "none" else (kl.detach(), 0 * by_q, 0 * by_p)


def matches(actual, expected, tolerance=1e-13):
    return all(torch.allclose(a, e, rtol=0, atol=tolerance) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("num_samples", [1, 2, 3])
@pytest.mark.parametrize(("value", "gradient"), SAMPLED)
def test_every_value_has_the_gradient_of_the_kl(value, gradient, num_samples, off_policy):
    actual = over_all_draws(num_samples, off_policy, value=value, gradient=gradient)
    assert matches(actual, exact_moments(value, gradient))


def test_the_proof_rejects_samples_of_another_distribution_without_their_weights():
    draws = torch.tensor(list(itertools.product(range(3), repeat=2))).T
    raw = [each.expand(9, -1).clone().requires_grad_() for each in (Q_LOGITS, P_LOGITS)]
    q, p, b = Categorical(logits=raw[0]), Categorical(logits=raw[1]), Categorical(logits=B_LOGITS)
    value = kl_from_log_probs(q.log_prob(draws), p.log_prob(draws), gradient="score_function")
    assert not matches(moments(value, b.log_prob(draws).sum(0).exp(), *raw), exact_moments(), 1e-2)


@pytest.mark.parametrize("value", get_args(LogProbValue))
def test_a_path_carries_the_gradient_of_k1_whatever_the_value(value):
    loc = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    q, x = Normal(loc, 1.0), loc + torch.randn(64, dtype=torch.float64)
    result = kl_from_log_probs(q.log_prob(x), P.log_prob(x), gradient="pathwise", value=value)
    (grad,) = torch.autograd.grad(result, loc)
    torch.testing.assert_close(grad, x.mean())


@pytest.mark.parametrize(("gradient", "reason"), [("k1", "expected gradient of zero"), ("k3", "KL(p‖q)")])
def test_an_option_without_the_gradient_of_the_kl_is_refused_and_the_right_one_named(gradient, reason):
    with pytest.raises(ValueError, match=rf"{re.escape(reason)}.*gradient='score_function' \(or 'k2'\)"):
        kl_from_log_probs(torch.zeros(4), torch.zeros(4), gradient=gradient)


def test_a_path_through_samples_of_another_distribution_is_refused():
    with pytest.raises(ValueError, match="log_behavior says that they came from another distribution"):
        kl_from_log_probs(torch.zeros(4), torch.zeros(4), gradient="pathwise", log_behavior=torch.zeros(4))


# Masks.


@pytest.mark.parametrize("gradient", ["score_function", "k2"])
def test_masked_samples_are_as_if_they_were_not_there(gradient):
    log_q, log_p = (torch.randn(5, dtype=torch.float64) for _ in range(2))
    kept = torch.tensor([True, False, True, True, False])
    bad = [torch.where(kept, t, torch.tensor([0, torch.nan, 0, 0, torch.inf])).requires_grad_() for t in (log_q, log_p)]
    few = [t[kept].clone().requires_grad_() for t in (log_q, log_p)]
    masked = kl_from_log_probs(*bad, gradient=gradient, mask=kept, value="k3")
    plain = kl_from_log_probs(*few, gradient=gradient, value="k3")
    torch.testing.assert_close(masked, plain)
    for all_of_it, part in zip(torch.autograd.grad(masked, bad), torch.autograd.grad(plain, few), strict=True):
        torch.testing.assert_close(all_of_it[kept], part)
        assert all_of_it[~kept].tolist() == [0.0, 0.0]


def test_weights_and_an_explicit_normalizer_scale_the_terms():
    log_q, log_p = torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3)
    assert kl_from_log_probs(log_q, log_p, mask=torch.tensor([1.0, 1.0, 2.0])) == 11 / 4
    assert kl_from_log_probs(log_q, log_p, mask=torch.tensor([1.0, 1.0, 2.0]), normalizer=10.0) == 11 / 10
    with pytest.raises(ValueError, match="the mask must leave at least one sample"):
        kl_from_log_probs(log_q, log_p, mask=torch.zeros(3))
    assert kl_from_log_probs(log_q, log_p, mask=torch.zeros(3), normalizer=3.0) == 0


# Sequences of two tokens: a first one, and a second one given the first.


class Tokens:
    """Distributions over sequences: logits `[..., 3]` of the first token and `[..., 3, 3]` of the second."""

    def __init__(self, raw):
        self.first, self.second = raw[..., :3].log_softmax(-1), raw[..., 3:].unflatten(-1, (3, 3)).log_softmax(-1)

    def log_prob(self, first, second):
        """Return the log-probabilities `[*, 2]` of the tokens, one sequence a row."""
        row = torch.arange(len(first))
        return torch.stack([self.first[row, first], self.second[row, first, second]], -1)


RAW = torch.linspace(-1, 1, 12, dtype=torch.float64)
Q_TOKENS, P_TOKENS, B_TOKENS = RAW.sin() * 2, RAW.roll(5), RAW.roll(3) / 2


def over_all_sequences(num_samples=2, off_policy=False, **options):
    sequences = list(itertools.product(range(3), repeat=2))
    draws = torch.tensor(list(itertools.product(sequences, repeat=num_samples)))  # [N, S, 2]
    raw = [each.expand(len(draws), -1).clone().requires_grad_() for each in (Q_TOKENS, P_TOKENS)]
    q, p, b = Tokens(raw[0]), Tokens(raw[1]), Tokens(B_TOKENS.expand(len(draws), -1))
    log_q, log_p, log_b = (torch.stack([d.log_prob(*draws[:, s].T) for s in range(num_samples)]) for d in (q, p, b))
    if off_policy:
        options["log_behavior"] = log_b
    weights = (log_b if off_policy else log_q).detach().sum((0, 2)).exp()
    return moments(kl_from_log_probs(log_q, log_p, token_dim=-1, **options), weights, *raw)


def exact_sequences(hold_prefixes=False):
    raw = [each.clone().requires_grad_() for each in (Q_TOKENS, P_TOKENS)]
    q, p = (Tokens(each) for each in raw)
    first = q.first.exp()
    prefixes = first.detach() if hold_prefixes else first
    second = (q.second.exp() * (q.second - p.second)).sum(-1)
    kl = (first * (q.first - p.first)).sum() + (prefixes * second).sum()
    return kl.detach(), *torch.autograd.grad(kl, raw)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("value", ["k1", "k3"])
@pytest.mark.parametrize("gradient", ["score_function", "k2"])
@pytest.mark.parametrize("level", get_args(Level))
def test_a_level_has_the_gradient_that_it_names(level, gradient, value, off_policy):
    actual = over_all_sequences(2, off_policy, level=level, gradient=gradient, value=value)
    assert matches(actual, exact_sequences(hold_prefixes=level == "token"), 1e-12)


def test_the_gradient_of_tokens_is_not_that_of_sequences():
    whole, held = exact_sequences(), exact_sequences(hold_prefixes=True)
    assert matches((whole[0], whole[2]), (held[0], held[2]))  # the value, and the gradient to p, are the same
    assert (whole[1] - held[1])[:3].abs().max() > 0.05
    torch.testing.assert_close(whole[1][3:], held[1][3:])


def test_masked_tokens_add_nothing():
    log_q = torch.tensor([[1.0, 2.0, torch.nan], [4.0, torch.inf, 7.0]], requires_grad=True)
    written = torch.tensor([[True, True, False], [True, False, False]])
    for level in get_args(Level):
        value = kl_from_log_probs(
            log_q, torch.zeros(2, 3), gradient="k2", mask=written, token_dim=1, level=level, normalizer=None
        )
        assert value == 3.5
        (grad,) = torch.autograd.grad(value, log_q)
        expected = [[1.5, 1.5, 0], [2, 0, 0]] if level == "sequence" else [[0.5, 1.0, 0], [2, 0, 0]]
        assert grad.tolist() == expected
    per_token = kl_from_log_probs(
        log_q, torch.zeros(2, 3), gradient="none", mask=written, token_dim=1, level="token", normalizer=written.sum()
    )
    torch.testing.assert_close(per_token, torch.tensor(7 / 3))


def test_incomplete_or_inconsistent_options_for_sequences_are_refused():
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"must be given together, got token_dim=1 and level=None.*prefix held fixed"):
        kl_from_log_probs(zeros, zeros, token_dim=1)
    with pytest.raises(ValueError, match="must be given together, got token_dim=None and level='token'"):
        kl_from_log_probs(zeros, zeros, level="token")
    with pytest.raises(ValueError, match="level must be 'sequence' or 'token', got 'word'"):
        kl_from_log_probs(zeros, zeros, token_dim=1, level="word")
    with pytest.raises(ValueError, match="must differ from dim, got -2 and 0"):
        kl_from_log_probs(zeros, zeros, token_dim=-2, level="token")
    with pytest.raises(ValueError, match=r"must be bool, got torch\.float32"):
        kl_from_log_probs(zeros, zeros, token_dim=1, level="token", mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="value must be 'k1', 'k2' or 'k3', got 'k4'"):
        kl_from_log_probs(zeros, zeros, value="k4")
    with pytest.raises(ValueError, match=r"log_behavior must have the shape of log_q, got \(2,\) and \(2, 3\)"):
        kl_from_log_probs(zeros, zeros, log_behavior=torch.zeros(2))


# Tails.


def test_heavy_tails_of_weights_and_ratios_give_a_warning():
    level = (torch.arange(4096) + 0.5) / 4096
    heavy = -0.9 * level.log()  # exp of it has a Pareto tail of shape 0.9
    with pytest.warns(HeavyTailWarning, match=r"value='k3'.*shape 0\.[89]"):
        kl_from_log_probs(torch.zeros(4096), heavy, value="k3")
    with pytest.warns(HeavyTailWarning, match=r"log_behavior.*closer to q"):
        kl_from_log_probs(heavy, torch.zeros(4096), log_behavior=torch.zeros(4096))
    kl_from_log_probs(torch.zeros(4096), heavy)  # k1 exponentiates nothing
    kl_from_log_probs(torch.zeros(4096), 0.2 * heavy, value="k3")


def class_log_probs(*shape, dtype=torch.float32, seed=0, scale=1.0):
    logits = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return logits.log_softmax(-1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 3), (16, 10), (2, 7), (1, 12), (50,), (5, 6, 4), (3, 5000), (8, 2)])
@pytest.mark.parametrize("dim", [0, -1])
def test_the_log_probabilities_of_classes_are_no_samples(shape, dtype, dim):
    log_q, log_p = class_log_probs(*shape, dtype=dtype, scale=3.0)
    with pytest.warns(UserWarning, match=r"log-probabilities of all \d+ classes.*categorical\(q_logits\)"):
        kl_from_log_probs(log_q, log_p, dim)


def test_classes_are_found_along_any_dimension_behind_a_mask_and_with_every_option():
    log_q, log_p = class_log_probs(6, 5)
    options = [
        {"value": "k2"},
        {"gradient": "none"},
        {"normalizer": 1.0},
        {"log_behavior": log_p},
        {"mask": torch.tensor([[True], [True], [False], [True], [True], [True]])},
    ]
    nan = torch.where(torch.arange(6)[:, None] == 2, math.nan, log_q)
    for q, p, more in [(log_q.mT, log_p.mT, {}), *((log_q, log_p, o) for o in options), (nan, log_p, options[-1])]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kl_from_log_probs(q, p, **more)
        assert any("classes" in str(w.message) for w in caught)
    log_q, log_p = class_log_probs(4, 6, 9)
    with pytest.warns(UserWarning, match="along dimension 2"):
        kl_from_log_probs(log_q, log_p, token_dim=1, level="sequence")


def test_the_error_for_tensors_instead_of_distributions_names_the_way_for_classes():
    with pytest.raises(TypeError, match=r"kl_from_log_probs.*categorical\(logits\)"):
        AutoKL()(torch.zeros(3, 4), torch.zeros(3, 4))


FAMILIES = {
    "normal": (Normal(0.0, 1.0), Normal(1.0, 2.0)),
    "narrow": (Normal(0.0, 0.1), Normal(0.0, 0.2)),
    "wide": (Normal(0.0, 3.0), Normal(0.0, 4.0)),
    "bernoulli": (Bernoulli(0.5), Bernoulli(0.25)),
    "two": (Categorical(torch.tensor([0.3, 0.7])), Categorical(torch.tensor([0.6, 0.4]))),
    "three": (Categorical(torch.ones(3)), Categorical(torch.tensor([0.5, 0.3, 0.2]))),
    "five": (Categorical(torch.ones(5)), Categorical(torch.arange(1.0, 6.0))),
}


@pytest.mark.parametrize("pair", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("shape", [(2,), (3,), (5,), (1, 5), (2, 40), (5, 4), (64, 8), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_samples_are_no_classes(pair, shape, dtype):
    q, p = pair
    for _ in range(20):
        x = q.sample(shape)
        kl_from_log_probs(q.log_prob(x).to(dtype), p.log_prob(x).to(dtype))  # warnings are errors


def test_every_point_of_a_support_once_or_weighed_by_a_mask_is_a_right_use():
    q, p = Categorical(torch.ones(30)), Categorical(torch.arange(1.0, 31.0))
    x, exact = torch.arange(30), kl_divergence(q, p)
    torch.testing.assert_close(kl_from_log_probs(q.log_prob(x), p.log_prob(x)), exact)
    q, p = p, q
    weighed = kl_from_log_probs(q.log_prob(x), p.log_prob(x), mask=q.probs)
    torch.testing.assert_close(weighed, kl_divergence(q, p))


def test_traced_and_empty_log_probabilities_are_not_looked_at():
    log_q, log_p = class_log_probs(6, 5)
    torch.func.vmap(kl_from_log_probs)(log_q, log_p)
    assert kl_from_log_probs(log_q[:, :0], log_p[:, :0]).shape == (0,)
