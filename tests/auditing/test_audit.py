"""`audit` calls right losses right, wrong ones wrong, and says what is wrong with them.

The corpora of losses are written as people write them, and know nothing of the catalogue.
"""

import functools
import json
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.distributions import Normal, kl_divergence

from tests.auditing.correct_losses import CORRECT
from tests.auditing.losses import Loss
from tests.auditing.wrong_losses import BROKEN, WRONG
from torch_klloss import AutoKL, audit
from torch_klloss.auditing import CATALOGUE, AuditReport

FEW = 320  # calls of a loss that draws, one for each group: enough to tell the mistakes of the corpus

# What nothing in a loss's answers can show, and where it is said instead.
UNSEEN = {
    "dims_of_an_image_for_a_video": "right for [batch, …] of four dimensions, see num_dims",
    "last_dim_alone_for_a_sequence": "right for [batch, latent], see num_dims",
    "log_of_a_square_that_underflows": "wrong at extreme parameters alone, which a remark says",
    "log_of_a_softmax": "wrong at extreme parameters alone, which a remark says",
    "floor_under_extreme_probabilities": "wrong at extreme parameters alone",
    "k1_at_detached_draws": "right where the samples are reparameterised, as the given ones are",
    "k3_at_detached_draws": "right where the samples are reparameterised",
    "summed_over_the_draws": "the sum over the batch is a convention",
    "entropy_cut_off": "right to p where the samples are fixed",
    "student_first": "its names say teacher and student: KL(teacher‖student) is what it returns",
}

# The corpus's words for what the catalogue calls so.
NAMES = {
    "mean-over-latent": "mean-over-latent",
    "mean-over-classes": "mean-over-latent",
    "missing-half": "half-missing",
    "half-twice": "half-twice",
    "swapped-arguments": "swapped",
    "density-weighted-twice": "weighted-twice",
    "absolute-value": "absolute-value",
    "k2-as-value": "half-squared-log-ratio",
    "squared": "squared-log-ratio",
    "cross-entropy": "cross-entropy",
    "symmetrised": "symmetrised",
    "variance-squared": "variance-squared",
    "log-term-halved": "log-term-halved",
    "std-as-logvar": "std-as-logvar",
    "std-as-variance": "std-as-var",
    "std-as-logstd": "std-as-logstd",
    "logvar-as-logstd": "logvar-as-logstd",
    "logstd-as-logvar": "logstd-as-logvar",
    "always-zero": "always-zero",
    "bits-for-nats": "bits",
    "sample-for-rsample": "detached-samples",
    "jensen-shannon": "jensen-shannon",
    "softmax-along-the-batch": "softmax-over-batch",
    "prior-ignored": "prior-ignored",
}
# Where the same word means something that the catalogue calls otherwise, or the same function.
OTHERWISE = {
    "weights_of_the_input": {"wrong-weights"},
    "drawn_and_taken_the_other_way": {"swapped"},
    "kl_div_of_log_probs": {"weighted-by-p", "sign"},
    "kl_div_of_densities": {"weighted-twice"},
    "terms_made_positive": {"absolute-terms"},
    "k3_of_detached_draws": {"gradient-of-other-direction"},
    "square_divided_by_sigma": set(),
    "first_example_for_all": set(),
}


def signature_of(loss: Loss) -> str:
    """Return the signature that `audit` is given: the family, where the loss takes two distributions."""
    if loss.takes == "distributions":
        return "distributions" if loss.family == "normal" else loss.family
    return loss.signature or "auto"


def report_on(loss: Loss, seed: int = 0) -> AuditReport:
    gradient = loss.gradient != "value only"
    return audit(loss.fn, signature=signature_of(loss), seed=seed, budget=FEW, gradient=gradient)


def named(report: AuditReport) -> list[frozenset[str]]:
    """The sets of mistakes that the report names; more than one where nothing tells them apart."""
    ids = frozenset(finding.id for finding in report.mistakes)
    others = report.mistakes[0].alternatives if report.mistakes else ()
    return [ids, *(frozenset(alternative.split(" and ")) for alternative in others)]


def traits(loss: Loss) -> set[str]:
    """Return what is wrong with a loss, what it takes, and the other ways in which losses of the corpora differ."""
    drawn = "drawn" if loss.stochastic else "exact"
    return {*loss.mistakes, f"{loss.takes} {loss.family} {drawn}", f"{loss.reduction} {drawn}", loss.gradient}


def one_of_each(corpus: Iterable[Loss]) -> list[Any]:
    """Return the losses as parameters; in every run those that have a trait which none before them has."""
    seen: set[str] = set()
    found = []
    for loss in corpus:
        new = traits(loss) - seen
        found.append(pytest.param(loss, id=loss.name, marks=() if new else pytest.mark.exhaustive))
        seen |= new
    return found


@pytest.mark.parametrize("loss", one_of_each(CORRECT))
def test_a_right_loss_is_called_right(loss):
    report = report_on(loss)
    assert report.ok, str(report)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("loss", [loss for loss in CORRECT if not loss.stochastic], ids=lambda loss: loss.name)
def test_a_right_loss_is_called_right_with_other_seeds(loss, seed):
    report = report_on(loss, seed)
    assert report.ok, str(report)


@pytest.mark.parametrize("loss", one_of_each(loss for loss in WRONG if loss.name not in UNSEEN))
def test_a_wrong_loss_is_called_wrong_and_what_is_wrong_is_named(loss):
    report = report_on(loss)
    assert not report.ok
    assert report.mistakes
    expected = OTHERWISE.get(loss.name, {NAMES[mistake] for mistake in loss.mistakes if mistake in NAMES})
    assert any(expected <= ids for ids in named(report)), str(report)


@pytest.mark.parametrize("loss", [loss for loss in WRONG if loss.name in UNSEEN], ids=lambda loss: loss.name)
def test_what_no_answer_shows_is_not_called_wrong(loss):
    assert report_on(loss).ok


@pytest.mark.parametrize("loss", BROKEN, ids=lambda loss: loss.name)
def test_a_broken_loss_gets_a_report_and_no_traceback(loss):
    report = report_on(loss)
    expected, *words = BROKEN_REPORTS[loss.name]
    assert report.verdict == expected
    for word in words:
        assert word in str(report)


BROKEN_REPORTS = {
    "shapes_that_do_not_fit": ("not judged", "raises RuntimeError"),
    "attribute_that_is_not_there": ("not judged", "raises AttributeError"),
    "keyword_that_is_not_there": ("not judged", "raises TypeError"),
    "dims_of_an_image_for_a_vector": ("right", "does not take [batch, latent]"),
    "needs_a_prior_too": ("not judged", "prior"),
    "forgets_to_return": ("not judged", "returns None"),
    "rounds_to_an_int": ("not judged", "returns an int"),
    "rounds_to_integers": ("not judged", "torch.int64"),
    "complex_logarithms": ("not judged", "complex"),
    "leaves_torch": ("not judged", "ndarray"),
    "one_float_an_example": ("not judged", "a list"),
    "value_and_its_parts": ("not judged", "a tuple"),
    "losses_by_name": ("not judged", "a dict"),
    "formatted_for_the_log": ("not judged", "a str"),
    "zero_over_zero": ("wrong value", "returns NaN"),
    "nothing_left": ("wrong value", "shape (0,)"),
    "squares_in_place": ("wrong value", "changes mu"),
    "normalises_in_place": ("not judged", "inplace operation"),
    "draws_for_nothing": ("right", "draws from torch's global random stream"),
    "same_draw_every_time": ("not judged", "seeds torch's global random stream"),
    "annealed with every call": ("wrong value",),
    "forgets_to_switch_gradients_on": ("wrong value and gradient", "whether torch records gradients"),
    "sets_the_default_dtype": ("wrong value", "default dtype"),
    "trains_inside": ("wrong gradient",),
}


def vae_kl(mu, logvar):
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1).mean()


def sampled_kl(q, p):
    z = q.rsample()
    return (q.log_prob(z) - p.log_prob(z)).sum(-1).mean()


def test_the_report_reads_as_a_paragraph():
    def my_kl(mu, logvar):
        return -0.5 * torch.mean(1 + logvar - mu**2 - logvar.exp())

    headline, evidence, fix, gradient, *_ = str(audit(my_kl)).splitlines()
    assert headline == (
        "my_kl(mu, logvar): WRONG VALUE. It is the KL per example divided by the latent size: it takes the mean over "
        "the latent dimensions (or classes), which the KL sums."
    )
    assert evidence.startswith("  at 16 x 8: got ")
    assert evidence.endswith("(ratio 0.1250 = 1/8, on 24 of 24 probes)")
    assert fix.startswith("  fix: ")
    assert "diagonal_normal(mu, logvar)" in fix
    assert gradient == "  gradient: the KL's, times 1/8."


def test_the_same_seed_gives_the_same_report_and_leaves_the_random_streams_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (audit(sampled_kl, budget=FEW, seed=5) for _ in range(2))
    assert str(first) == str(second)
    assert first.points == second.points
    assert torch.equal(before, torch.get_rng_state())


def test_another_seed_asks_about_other_pairs():
    first, second = (audit(vae_kl, seed=seed).points for seed in (0, 1))
    assert first[0].kl != second[0].kl


@pytest.mark.parametrize("factor", [1.15, pytest.param(0.9, marks=pytest.mark.exhaustive)])
def test_a_sampled_loss_that_is_off_by_a_little_is_found_by_all_its_probes_together(factor):
    report = audit(lambda q, p: factor * sampled_kl(q, p))
    assert report.verdict == "wrong value"
    assert report.mistakes[0].id == "constant-factor"


@pytest.mark.parametrize("seed", range(4))
def test_noise_that_examples_share_is_not_taken_for_noise_of_their_own(seed):
    def kl(mean, logvar):  # the same draw for the whole batch: unbiased, and the errors of the examples add up
        noise = torch.randn(mean.shape[1], dtype=mean.dtype)
        z = mean + (0.5 * logvar).exp() * noise
        return 0.5 * (z**2 - noise**2 - logvar).sum(-1)

    report = audit(kl, seed=seed, budget=FEW)
    assert report.ok, str(report)


def test_two_mistakes_at_once_are_both_named():
    report = audit(lambda mu, logvar: -(1 + logvar - mu**2 - logvar.exp()).mean())
    assert {finding.id for finding in report.mistakes} == {"half-missing", "mean-over-latent"}


def test_three_mistakes_at_once_are_all_named():
    def loss(mu, sigma):  # sigma taken for a log-variance, the half missing, the mean over the latents
        return -(1 + sigma - mu**2 - sigma.exp()).mean()

    found = {finding.id for finding in audit(loss).mistakes}
    assert found == {"std-as-logvar", "half-missing", "mean-over-latent"}


def test_a_constant_without_a_name_is_measured():
    report = audit(lambda mu, logvar: 0.37 * vae_kl(mu, logvar))
    assert "0.37 times the KL on all probes" in str(report)
    assert "gradient: the KL's, times 0.37." in str(report)


def test_an_offset_without_a_name_is_measured():
    report = audit(lambda mu, logvar: 2 * vae_kl(mu, logvar) + 0.25)
    assert report.mistakes[0].id == "affine"
    assert "2 times the KL plus 0.25" in str(report)


@pytest.mark.parametrize(
    ("reduce", "words"),
    [
        (lambda kl: kl.sum(-1).mean(), "mean over the batch"),
        (lambda kl: kl.sum(), "sum over the batch"),
        (lambda kl: kl.sum(-1), "value for each example"),
        (lambda kl: kl, "value for each element"),
        (lambda kl: kl.mean(0), "value for each latent dimension"),
    ],
)
def test_a_convention_is_named_and_is_not_a_mistake(reduce, words):
    report = audit(lambda mu, logvar: reduce(-0.5 * (1 + logvar - mu**2 - logvar.exp())))
    assert report.ok
    assert words in str(report)


def test_hypotheses_that_coincide_are_reported_together():
    report = audit(lambda mu, logvar: 0.5 * (mu**2 - 1).sum(-1).mean() + 0 * logvar.sum())
    assert {"exp-missing"} in map(set, named(report))
    assert {"log-missing"} in map(set, named(report))


def test_no_gradient_at_all_is_wrong_for_a_loss_and_right_for_a_number_to_log():
    with_no_grad = torch.no_grad()(vae_kl)
    assert audit(with_no_grad, signature="mean_logvar").verdict == "wrong gradient"
    assert audit(with_no_grad, signature="mean_logvar", gradient=False).ok
    assert audit(lambda mu, logvar: vae_kl(mu, logvar).item(), gradient=False).ok


def test_a_fixed_teacher_is_named_and_is_not_a_mistake():
    report = audit(lambda q, p: kl_divergence(Normal(q.mean.detach(), q.stddev.detach()), p).sum(-1).mean())
    assert report.ok
    assert "q is fixed" in report.gradient


def test_a_partial_a_module_a_method_and_a_script_are_taken():
    class Loss(torch.nn.Module):
        def forward(self, mu, logvar, beta: float = 1.0):
            return beta * vae_kl(mu, logvar)

    class Model:
        def kl(self, mu, logvar):
            return vae_kl(mu, logvar)

    assert audit(Loss()).ok
    assert audit(Model().kl).ok
    assert audit(functools.partial(F.kl_div, reduction="batchmean")).ok
    assert audit(torch.nn.KLDivLoss(reduction="batchmean", log_target=True)).ok
    assert not audit(torch.nn.KLDivLoss()).ok
    assert audit(AutoKL()).ok
    assert audit(kl_divergence).ok  # torch's own names, (p, q), keep their order


def test_names_tell_the_order_of_the_parameters():
    assert audit(lambda logvar, mu: vae_kl(mu, logvar)).ok
    assert audit(lambda prior, posterior: kl_divergence(posterior, prior)).ok
    assert not audit(lambda posterior, prior: kl_divergence(prior, posterior)).ok


def test_an_adapter_calls_what_has_a_signature_of_its_own():
    def kl(mean_q, mean_p, variance_q, variance_p):
        return 0.5 * ((variance_q + (mean_q - mean_p) ** 2) / variance_p - 1 + (variance_p / variance_q).log()).sum(1)

    def adapter(fn, q, p):
        return fn(q.mean, p.mean, q.variance, p.variance)

    assert audit(lambda a, b, c, d: kl(a, b, c, d)).verdict == "not judged"
    assert audit(kl, signature=adapter).ok
    assert audit(kl).ok  # by the names
    assert not audit(kl, signature=lambda fn, q, p: adapter(fn, p, q)).ok


def test_what_is_right_for_joint_distributions_alone_is_said_to_be():
    report = audit(lambda q, p: kl_divergence(q, p).mean())
    assert not report.ok
    assert "signature='independent'" in str(report)
    assert audit(lambda q, p: kl_divergence(q, p).mean(), signature="independent").ok


def test_dimensions_that_are_fixed_in_the_code_are_found_where_there_are_others():
    def images(mu, logvar):
        return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum((1, 2, 3)).mean()

    assert audit(images).ok  # it does not take two, so it is called with four
    assert not audit(images, num_dims=5).ok
    assert not audit(vae_kl, num_dims=3).ok
    assert "in the middle for examples" in str(audit(vae_kl))


def test_digits_lost_near_equality_and_overflow_are_remarks():
    report = audit(vae_kl)
    assert report.ok
    assert any("loses its digits" in remark for remark in report.remarks)
    overflows = audit(lambda mu, logvar: 0.5 * (mu**2 + logvar.exp() ** 2 / logvar.exp() - 1 - logvar).sum(-1).mean())
    assert overflows.ok
    assert any("+80" in remark and "inf" in remark for remark in overflows.remarks)
    assert not any("digits" in remark for remark in audit(AutoKL()).remarks)


def test_what_cannot_be_called_raises_and_says_what_to_do():
    with pytest.raises(TypeError, match="can be called"):
        audit(3.0)
    with pytest.raises(ValueError, match="signature must be"):
        audit(vae_kl, signature="mean_sigma")
    report = audit(lambda a, b: a.sum() + b.sum())
    assert report.verdict == "not judged"
    assert "signature=" in str(report)


def test_a_module_is_left_as_it_was():
    class Running(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, mu, logvar):
            self.calls += 1
            return vae_kl(mu, logvar)

    module = Running()
    assert audit(module).ok
    assert module.calls == 0


def test_an_object_that_counts_its_calls_is_left_as_it_was():
    class Counting:
        calls = 0

        def __call__(self, mu, logvar):
            self.calls += 1
            return vae_kl(mu, logvar)

    loss = Counting()
    assert audit(loss).ok
    assert loss.calls == 0


def test_a_report_is_plain_data_and_has_a_figure():
    report = audit(lambda mu, logvar: vae_kl(mu, logvar) / mu.shape[1])
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ok"] is False
    assert plain["mistakes"][0]["id"] == "mean-over-latent"
    assert len(plain["points"]) == report.num_probes
    assert report.figure().axes
    with pytest.raises(ValueError, match="nothing to draw"):
        audit(lambda mu, logvar: None).figure()


def test_every_mistake_is_declared_once_and_completely():
    assert len({mistake.id for mistake in CATALOGUE}) == len(CATALOGUE)
    assert CATALOGUE[0].id == "weighted-twice"
    for mistake in CATALOGUE:
        assert mistake.what
        assert mistake.fix.endswith(".")
        assert mistake.wrong
        forms = (mistake.analytic, mistake.sampled, mistake.categorical, mistake.gradient)
        assert any(form is not None for form in forms)


def test_the_questions_own_mistake_is_named():
    report = audit(lambda log_q, log_p: (log_q.exp() * (log_q - log_p)).mean())
    assert [finding.id for finding in report.mistakes] == ["weighted-twice"]
    assert math.isfinite(report.points[0].got)
