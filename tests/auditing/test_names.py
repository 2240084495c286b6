"""The names of parameters decide what a loss takes, and which of two is q."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.distributions import Categorical, Normal, kl_divergence

from torch_klloss import audit
from torch_klloss.auditing.experiment.parameters import SignatureError, bindings_to_try


def taking(*names):
    """A loss with parameters of these names."""
    scope = {}
    exec(f"def loss({', '.join(names)}): return None", scope)
    return scope["loss"]


def roles_of(names, binding):
    return {binding.signature.roles[role]: name for role, name in zip(binding.order, names, strict=True)}


@pytest.mark.parametrize(
    ("q", "p"),
    [
        ("old_log_prob", "log_prob"),
        ("oldlogprob", "newlogprob"),
        ("b_logprobs", "newlogprob"),
        ("mb_logp", "logp"),
        ("logp_old", "logp"),
        ("log_pi_old", "log_pi"),
        ("prev_logprobs", "curr_logprobs"),
        ("behaviour_log_prob", "target_log_prob"),
        ("behavior_logp", "policy_logp"),
        ("old_action_log_probs", "action_log_probs"),
        ("oldLogProb", "newLogProb"),
        ("rollout_logprobs", "logprobs"),
        ("logprobs", "ref_logprobs"),
        ("per_token_logps", "ref_per_token_logps"),
        ("policy_logps", "reference_logps"),
        ("logp", "sft_logp"),
        ("old_logprobs", "ref_logprobs"),
        ("student_logprobs", "teacher_logprobs"),
        ("log_posterior_prob", "log_prior_prob"),
    ],
)
def test_draws_come_from_the_old_policy_and_are_compared_with_a_reference(q, p):
    for names in ((q, p), (p, q)):
        first = bindings_to_try(taking(*names), "auto")[0]
        assert first.signature.name == "log_probs"
        assert roles_of(names, first) == {"log_q": q, "log_p": p}
        assert f"q is {q}" in first.note


@pytest.mark.parametrize("names", [("log_prob_a", "log_prob_b"), ("log_prob", "entropy"), ("a", "b"), ("b", "x")])
def test_names_that_do_not_tell_are_refused(names):
    with pytest.raises(SignatureError, match="determine no signature"):
        bindings_to_try(taking(*names), "auto")


def k1(q, p):
    return (q - p).mean()


def k3(q, p):
    return (torch.exp(p - q) - 1 - (p - q)).mean()


@pytest.mark.parametrize("estimate", [k1, k3])
def test_the_approximate_kl_of_ppo_and_the_penalty_of_rlhf_are_right(estimate):
    assert audit(lambda old_log_prob, log_prob: estimate(old_log_prob, log_prob), gradient=False).ok
    assert audit(lambda logprobs, ref_logprobs: estimate(logprobs, ref_logprobs), gradient=False).ok
    wrong = audit(lambda old_log_prob, log_prob: estimate(log_prob, old_log_prob), gradient=False, budget=320)
    assert wrong.mistakes[0].id == {k1: "sign", k3: "k3-upside-down"}[estimate]


def test_two_policies_may_be_compared_in_either_direction_and_the_report_says_in_which():
    for report in (
        audit(lambda old_dist, dist: kl_divergence(old_dist, dist).sum(-1).mean()),
        audit(lambda pi_old, pi: kl_divergence(pi, pi_old).sum(-1).mean()),
        audit(lambda a, b, f=kl_divergence: f(a, b).sum(-1).mean(), signature="distributions"),
    ):
        assert report.ok, report
    report = audit(
        lambda ref_logits, policy_logits: kl_divergence(
            Categorical(logits=policy_logits), Categorical(logits=ref_logits)
        ).mean()
    )
    assert report.ok
    assert "q is policy_logits, and p is ref_logits." in report.remarks
    assert not audit(lambda pi_old, pi: 2 * kl_divergence(pi, pi_old).sum(-1).mean()).ok


def test_log_probabilities_of_a_teacher_may_be_of_all_classes():
    report = audit(
        lambda teacher_log_probs, student_log_probs: (
            teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)
        ).sum(-1)
    )
    assert report.ok
    assert "the log-probabilities of all classes" in str(report)


def general(mu_q, sigma_q, mu_p, sigma_p):
    return (torch.log(sigma_p / sigma_q) + (sigma_q**2 + (mu_q - mu_p) ** 2) / (2 * sigma_p**2) - 0.5).sum(-1).mean()


@pytest.mark.parametrize(
    ("names", "signature"),
    [
        ("mu_q sigma_q mu_p sigma_p", "means_stds"),
        ("mu_q mu_p sigma_q sigma_p", "means_stds"),
        ("mu1 logvar1 mu2 logvar2", "means_logvars"),
        ("mean1 std1 mean2 std2", "means_stds"),
        ("mu1 sigma1 mu2 sigma2", "means_stds"),
        ("prior_mu prior_logvar mu logvar", "means_logvars"),
        ("mu logvar mu_prior logvar_prior", "means_logvars"),
        ("post_mean post_var prior_mean prior_var", "means_vars"),
        ("qMu qLogSigma pMu pLogSigma", "means_logstds"),
        ("enc_mean enc_std prior_mean prior_std", "means_stds"),
        ("q_mu q_logvar p_mu p_logvar", "means_logvars"),
    ],
)
def test_four_tensors_are_two_means_and_two_spreads(names, signature):
    names = names.split()
    binding = bindings_to_try(taking(*names), "auto")[0]
    assert binding.signature.name == signature
    roles = roles_of(names, binding)
    is_of_p = [any(word in name.lower() for word in ("p_", "_p", "2", "prior", "pmu", "plog")) for name in names]
    assert {name for name, p in zip(names, is_of_p, strict=True) if p} == {roles[r] for r in roles if r[0] == "p"}
    assert all(("m" in roles[r].lower() and "log" not in roles[r].lower()) for r in roles if r.endswith("mean"))


@pytest.mark.parametrize("spread", ["std", "logstd", "var", "logvar"])
def test_the_kl_of_four_tensors_is_right_and_its_mistakes_have_names(spread):
    to_std = {"std": lambda s: s, "logstd": torch.exp, "var": torch.sqrt, "logvar": lambda s: (s / 2).exp()}[spread]

    def kl(q_mean, q_spread, p_mean, p_spread):
        return general(q_mean, to_std(q_spread), p_mean, to_std(p_spread))

    name = f"means_{spread}s"
    report = audit(kl, signature=name)
    assert report.ok, report
    assert audit(lambda a, b, c, d: kl(c, d, a, b), signature=name).mistakes[0].id == "swapped"
    assert audit(lambda a, b, c, d: 2 * kl(a, b, c, d), signature=name).mistakes[0].id == "half-missing"


def test_standard_deviations_taken_for_log_variances_are_found_among_four_tensors():
    def kl(mu_q, sigma_q, mu_p, sigma_p):
        return general(mu_q, (sigma_q / 2).exp(), mu_p, (sigma_p / 2).exp())

    report = audit(kl)
    assert report.mistakes[0].id == "std-as-logvar"
    assert "(sigma_q**2 + (mu_q - mu_p)**2) / (2 * sigma_p**2)" in report.mistakes[0].fix


def to_uniform(logits):
    q = logits.softmax(-1)
    return (q * torch.log(q * logits.shape[-1])).sum(-1).mean()


def test_the_kl_to_the_uniform_law_takes_one_tensor():
    assert audit(to_uniform).ok
    assert audit(lambda qy: (qy * (qy.log() + torch.tensor(float(qy.shape[-1])).log())).sum(-1)).ok
    assert audit(lambda log_probs: to_uniform(log_probs), signature="uniform_log_probs").ok
    assert all(audit(to_uniform, signature=name).ok for name in ("logits", "categorical"))
    assert audit(lambda logits: to_uniform(logits) / logits.shape[-1]).mistakes[0].id == "mean-over-latent"
    entropy = audit(lambda probs: (probs * probs.log()).sum(-1).mean())
    assert entropy.mistakes[0].id == "negative-entropy"


def test_rho_is_a_logarithm_or_what_softplus_takes():
    def kl(mu, std):
        return (0.5 * (mu**2 + std**2 - 1) - std.log()).sum(-1).mean()

    assert audit(lambda mu, rho: kl(mu, rho.exp())).ok
    assert audit(lambda mu, rho: kl(mu, F.softplus(rho))).ok
    assert audit(lambda mu, raw_std: kl(mu, F.softplus(raw_std))).ok
    assert audit(lambda mu, std: kl(mu, F.softplus(std))).mistakes[0].id == "std-as-rho"
    assert not audit(lambda mu, rho: 2 * kl(mu, F.softplus(rho))).ok


def test_a_normal_for_q_alone_is_told_by_an_adapter():
    loss = lambda q: kl_divergence(q, Normal(0.0, 1.0)).sum(-1).mean()
    assert audit(loss, signature=lambda fn, q, p: fn(Normal((q.loc - p.loc) / p.scale, q.scale / p.scale))).ok
