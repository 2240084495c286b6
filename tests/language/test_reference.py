"""ReferenceKL proved by enumeration: all sequences of a model of three tokens, one of which ends the sequence."""

import itertools

import pytest
import torch
from torch.nn.functional import log_softmax

from torch_klloss.language import ReferenceKL, log_probs_of, token_kl

END, MOST = 2, 3
PREFIXES = [(), *((a,) for a in range(END)), *itertools.product(range(END), repeat=2)]


def sequences():
    """Return the ids `[sequences, time]` of all sequences, padded with the end, which tokens were written, and rows."""
    found = []
    for length in range(1, MOST + 1):
        for body in itertools.product(range(END), repeat=length - 1):
            found += [(*body, last) for last in ((0, 1, END) if length == MOST else (END,))]
    ids = torch.tensor([[*s, *[END] * (MOST - len(s))] for s in found])
    written = torch.tensor([[t < len(s) for t in range(MOST)] for s in found])
    rows = torch.tensor([[PREFIXES.index(s[:t]) if t < len(s) else 0 for t in range(MOST)] for s in found])
    return ids, written, rows


IDS, WRITTEN, ROWS = sequences()


@pytest.fixture
def tables():
    g = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(len(PREFIXES), 3, generator=g, dtype=torch.float64)
    return draw().requires_grad_(), draw().requires_grad_(), draw()


def log_prob(table):
    logs = log_softmax(table[ROWS], -1).gather(-1, IDS.unsqueeze(-1)).squeeze(-1)
    return torch.where(WRITTEN, logs, 0.0)


def truth(policy, reference, gradient):
    """Return the KL of the sequences; with gradient="token" that of the steps with their prefixes held fixed."""
    if gradient == "token":
        logs = log_prob(policy)
        prefix = torch.nn.functional.pad(logs[:, :-1].cumsum(-1), (1, 0)).exp().detach()
        lq, lp = log_softmax(policy, -1), log_softmax(reference, -1)
        seen = {}
        for row, reached, written in zip(ROWS.flatten(), prefix.flatten(), WRITTEN.flatten(), strict=True):
            if written:
                seen[int(row)] = reached
        return sum(reached * (lq[row].exp() * (lq[row] - lp[row])).sum() for row, reached in seen.items())
    log_q, log_p = log_prob(policy).sum(-1), log_prob(reference).sum(-1)
    return (log_q.exp() * (log_q - log_p)).sum()


def expected(loss, behavior, policy, reference, **options):
    """Return the mean of a loss over all sequences, drawn from the behaviour."""
    chance = log_prob(behavior).detach().sum(-1).exp()
    each = []
    for i in range(len(IDS)):
        one = slice(i, i + 1)
        given = {key: value[one] for key, value in options.items()}
        each.append(loss(policy=policy[ROWS[one]], reference=reference[ROWS[one]], tokens=IDS[one], mask=WRITTEN[one],
                         **given))  # fmt: skip
    return (chance * torch.stack(each)).sum()


def gap(found, right, *tables):
    grads = [torch.autograd.grad(t, tables, retain_graph=True, materialize_grads=True) for t in (found, right)]
    return (found - right).abs().item(), max((a - b).abs().max().item() for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("is_on_policy", [True, False])
@pytest.mark.parametrize("gradient", ["full", "token"])
@pytest.mark.parametrize("estimator", ["exact", "k1", "k3"])
def test_value_and_gradient_are_those_of_the_sequences(tables, estimator, gradient, is_on_policy):
    policy, reference, other = tables
    behavior = policy.detach() if is_on_policy else other
    options = {} if is_on_policy else {"log_behavior": log_prob(behavior)}
    loss = ReferenceKL(estimator, gradient=gradient, reduction="sum")
    found = expected(loss, behavior, policy, reference, **options)
    assert max(gap(found, truth(policy, reference, gradient), policy, reference)) < 1e-12
    assert "without the score of the future" in repr(loss) or gradient == "full"


@pytest.mark.parametrize("estimator", ["exact", "k1", "k3"])
def test_without_a_gradient_the_value_is_the_same(tables, estimator):
    policy, reference, _ = tables
    found = expected(ReferenceKL(estimator, gradient="none", reduction="sum"), policy.detach(), policy, reference)
    assert not found.requires_grad
    assert abs(found - truth(policy, reference, "full")) < 1e-12


def test_the_gradient_of_the_steps_is_not_that_of_the_sequences(tables):
    policy, reference, _ = tables
    found = expected(ReferenceKL(gradient="token", reduction="sum"), policy.detach(), policy, reference)
    value, gradient = gap(found, truth(policy, reference, "full"), policy, reference)
    assert value < 1e-12
    assert gradient > 1e-3


def pathwise(power):
    def loss(*, policy, reference, tokens, mask):
        log_q, log_p = (log_probs_of(t, tokens) for t in (policy, reference))
        ratio = torch.where(mask, log_q - log_p, 0.0)
        return (ratio if power == "k1" else torch.expm1(-ratio) + ratio).sum()

    return loss


def own_advantage(*, policy, reference, tokens, mask):
    steps = token_kl(policy, reference, mask=mask)
    return steps.sum().detach() + (steps.detach() * log_probs_of(policy, tokens)).sum()


def behind(own):
    """Return losses off policy with the ratio of a token alone."""

    def loss(*, policy, reference, tokens, mask, log_behavior):
        log_q, log_p = (torch.where(mask, log_probs_of(t, tokens), 0.0) for t in (policy, reference))
        ratio = log_q - log_behavior
        if own == "k3":  # of the token alone
            return (ratio.exp() * (torch.expm1(log_p - log_q) + log_q - log_p)).sum()
        steps = token_kl(policy, reference, mask=mask)
        return (ratio.detach().exp() * steps).sum()

    return loss


@pytest.mark.parametrize("wrong", [pathwise("k1"), pathwise("k3"), own_advantage])
def test_the_proof_rejects_what_is_done_on_policy(tables, wrong):
    policy, reference, _ = tables
    found = expected(wrong, policy.detach(), policy, reference)
    assert gap(found, truth(policy, reference, "full"), policy, reference)[1] > 1e-3


@pytest.mark.parametrize("own", ["k3", "own"])
def test_the_proof_rejects_the_ratio_of_a_token_alone(tables, own):
    policy, reference, other = tables
    found = expected(behind(own), other, policy, reference, log_behavior=log_prob(other))
    assert max(gap(found, truth(policy, reference, "full"), policy, reference)) > 1e-3


def test_the_detached_exact_kl_as_the_advantage_of_its_own_token_has_no_gradient(tables):
    policy, reference, _ = tables
    chance = log_prob(policy.detach()).sum(-1).exp()
    steps = token_kl(policy[ROWS], reference[ROWS], mask=WRITTEN).detach()
    surrogate = (chance * (steps * torch.where(WRITTEN, log_probs_of(policy[ROWS], IDS), 0.0)).sum(-1)).sum()
    assert torch.autograd.grad(surrogate, policy)[0].abs().max() < 1e-15


def test_the_exact_estimate_has_the_least_variance(tables):
    policy, reference, _ = tables
    chance = log_prob(policy).sum(-1).exp().detach()

    def variance(estimator):
        loss = ReferenceKL(estimator, gradient="none", reduction="none")
        each = loss(policy=policy[ROWS], reference=reference[ROWS], tokens=IDS, mask=WRITTEN).sum(-1)
        return (chance * each.square()).sum() - (chance * each).sum().square()

    assert variance("exact") < variance("k3")
    assert variance("exact") < variance("k1") / 2


def test_rewards_are_minus_the_penalty_and_their_score_is_the_gradient_of_the_kl(tables):
    policy, reference, _ = tables
    rewards = ReferenceKL("k1", weight=0.5).rewards(
        policy=policy[ROWS], reference=reference[ROWS], tokens=IDS, mask=WRITTEN
    )
    assert not rewards.requires_grad
    torch.testing.assert_close(rewards, -0.5 * (log_prob(policy) - log_prob(reference)).detach())
    chance = log_prob(policy).sum(-1).exp().detach()
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    found = -2 * (chance.unsqueeze(-1) * to_go * log_prob(policy)).sum()
    right = torch.autograd.grad(truth(policy, reference, "full"), policy)[0]
    assert (torch.autograd.grad(found, policy)[0] - right).abs().max() < 1e-12


def test_a_fully_masked_sequence_is_no_sequence(tables):
    policy, reference, _ = tables
    mask = WRITTEN & (torch.arange(len(IDS)) < 5).unsqueeze(-1)
    for estimator in ("exact", "k1"):
        loss = ReferenceKL(estimator)
        found = loss(policy=policy[ROWS], reference=reference[ROWS], tokens=IDS, mask=mask)
        kept = loss(policy=policy[ROWS[:5]], reference=reference[ROWS[:5]], tokens=IDS[:5], mask=WRITTEN[:5])
        torch.testing.assert_close(found, kept)


def test_padding_of_any_content_changes_nothing(tables):
    policy, reference, _ = tables
    for estimator, fill in itertools.product(("exact", "k1", "k3"), (float("nan"), float("inf"), 1e10)):
        results = []
        for padding in (0.0, fill):
            logits = torch.where(WRITTEN.unsqueeze(-1), policy.detach()[ROWS], padding).requires_grad_()
            ids = torch.where(WRITTEN, IDS, 0 if padding == 0 else -7)
            value = ReferenceKL(estimator)(policy=logits, reference=reference[ROWS], tokens=ids, mask=WRITTEN)
            results.append((value.item(), torch.autograd.grad(value, logits)[0]))
        assert results[0][0] == results[1][0]
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReferenceKL("k1", gradient="pathwise"), "expected gradient of k1 as a loss is zero"),
        (lambda: ReferenceKL("exact", gradient="advantage"), "expected gradient is exactly zero"),
        (lambda: ReferenceKL("k3", gradient="ratio"), r"0\.1381 for 0\.1414"),
        (lambda: ReferenceKL(reduction="token_mean"), "number of tokens of a sequence depends on the policy"),
        (lambda: ReferenceKL("k2"), "estimator must be 'exact', 'k1' or 'k3', got 'k2'"),
        (lambda: ReferenceKL("exact").rewards(policy=torch.zeros(1, 1, 2), reference=torch.zeros(1, 1, 2)), "backprop"),
        (lambda: ReferenceKL("k3").rewards(policy=torch.zeros(1, 1, 2), reference=torch.zeros(1, 1, 2)), "adds a term"),
        (
            lambda: ReferenceKL()(policy=torch.zeros(2, 3), reference=torch.zeros(2, 3)),
            r"needs logits \[batch, time, vocabulary\].*ReferenceKL\('k1'\)",
        ),
        (
            lambda: ReferenceKL()(policy=torch.zeros(1, 2, 3, requires_grad=True), reference=torch.zeros(1, 2, 3)),
            "needs tokens",
        ),
        (lambda: ReferenceKL("k1")(policy=torch.zeros(1, 2, 3), reference=torch.zeros(1, 2, 3)), "needs tokens"),
        (
            lambda: ReferenceKL("k1")(
                policy=torch.zeros(1, 2), reference=torch.zeros(1, 2), mask=torch.zeros(1, 2, dtype=torch.bool)
            ),
            "no token of the batch is valid.*normalizer=",
        ),
        (
            lambda: ReferenceKL()(
                policy=torch.zeros(1, 2, 3), reference=torch.zeros(1, 2, 3), tokens=torch.full((1, 2), 3)
            ),
            r"tokens must be ids of the vocabulary, 0 to 2.*got 3",
        ),
    ],
)
def test_what_would_be_wrong_is_refused_with_the_reason(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_policy_goes_by_name():
    with pytest.raises(TypeError, match=r"policy and reference must be given by name"):
        ReferenceKL()(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
