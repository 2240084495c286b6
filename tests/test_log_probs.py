"""kl_from_log_probs: what the question's formula should have been."""

import itertools

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

from torch_klloss import kl_from_log_probs

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


def test_gradient_none_gives_the_number_alone():
    log_q, log_p = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    value = kl_from_log_probs(log_q, log_p, gradient="none")
    assert not value.requires_grad
    torch.testing.assert_close(value, (log_q - log_p).mean().detach())


def test_a_fixed_q_needs_no_word_and_p_gets_its_gradient():
    log_q, log_p = torch.randn(4), torch.randn(4, requires_grad=True)
    (grad,) = torch.autograd.grad(kl_from_log_probs(log_q, log_p), log_p)
    assert grad.tolist() == [-0.25] * 4


def test_a_gradient_in_log_q_asks_how_the_samples_were_made():
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
    with pytest.raises(ValueError, match="gradient must be 'pathwise', 'score_function' or 'none', got 'reinforce'"):
        kl_from_log_probs(torch.zeros(3), torch.zeros(3), gradient="reinforce")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_with_in_float32(dtype):
    log_q, log_p = torch.full((4096,), 1.0, dtype=dtype), torch.full((4096,), 0.75, dtype=dtype)
    value = kl_from_log_probs(log_q, log_p)
    assert (value.dtype, value.item()) == (torch.float32, 0.25)


def test_infinite_ratios_are_infinite_and_leave_no_nan_in_the_gradient():
    log_q = torch.tensor([-1.0, -2.0], requires_grad=True)
    log_p = torch.tensor([-1.5, -torch.inf])
    value = kl_from_log_probs(log_q, log_p, gradient="score_function")
    assert value == torch.inf
    assert torch.autograd.grad(value, log_q)[0].isfinite().all()
