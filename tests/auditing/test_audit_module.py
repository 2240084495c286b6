"""`audit_module` finds the wrong KLs of a training step and names the mistakes; right ones it leaves alone."""

import json
import random

import lightning.pytorch as lp
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody writes it
from torch import nn
from torch.distributions import Categorical, Independent, Laplace, Normal, kl_divergence

from torch_klloss import AutoKL, ELBOLoss, MonteCarloKL, diagonal_normal, standard_normal_like
from torch_klloss.auditing.training_step import ModuleReport, audit_module

DATA, LATENT, BATCH = 6, 5, 16


def batch(size=BATCH):
    return torch.randn(size, DATA), torch.zeros(size)


def made(step, base=nn.Module, latent=LATENT, **members):
    """A VAE whose training step is `step`."""

    class VAE(base):
        def __init__(self):
            super().__init__()
            self.enc, self.dec = nn.Linear(DATA, 2 * latent), nn.Linear(latent, DATA)
            self.beta = 0.3

        def encode(self, x):
            return self.enc(x).chunk(2, dim=1)

        def reparameterize(self, mu, logvar):
            return mu + (0.5 * logvar).exp() * torch.randn_like(mu)

        training_step = step

    for name, member in members.items():
        setattr(VAE, name, member)
    return VAE()


def terms(mu, logvar):
    return -0.5 * (1 + logvar - mu.pow(2) - logvar.exp())


def reconstruction(vae, x, z):
    return F.mse_loss(vae.dec(z), x, reduction="sum") / len(x)


def with_kl(compute):
    """A training step, with `compute` for its KL."""

    def training_step(self, batch, batch_idx):
        x, _ = batch
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        kl = compute(mu, logvar)
        return reconstruction(self, x, z) + self.beta * kl

    return training_step


def only(report):
    assert len(report.findings) == 1, str(report)
    return report.findings[0]


# Mistakes, where they are made.


@pytest.mark.parametrize("base", [nn.Module, pl.LightningModule, lp.LightningModule], ids=["torch", "pl", "lightning"])
def test_a_mean_over_latents_in_the_step_is_found(base):
    def training_step(self, batch, batch_idx):
        x, _ = batch
        mu, logvar = self.encode(x)
        kl = -0.5 * torch.mean(1 + logvar - mu.pow(2) - logvar.exp())
        if hasattr(self, "log"):
            self.log("train/kl", kl, on_epoch=True)
            self.log_dict({"kl_again": kl.detach()})
        return reconstruction(self, x, self.reparameterize(mu, logvar)) + kl

    report = audit_module(made(training_step, base), batch())
    found = only(report)
    assert (found.verdict, found.mistakes, report.ok) == ("wrong", ("mean-over-latent",), False)
    assert found.ratio == pytest.approx(1 / LATENT, rel=1e-4)
    line = training_step.__code__.co_firstlineno + 3
    assert found.where.startswith(f"test_audit_module.py:{line} in ")
    assert found.where.endswith("training_step")
    assert found.name == "kl"


def test_a_mistake_in_a_method_is_found_there_and_audited_in_full():
    def kl_loss(self, mu, logvar):
        return -0.5 * torch.mean(1 + logvar - mu.pow(2) - logvar.exp())

    def training_step(self, batch, batch_idx):
        mu, logvar = self.encode(batch[0])
        return reconstruction(self, batch[0], self.reparameterize(mu, logvar)) + 0.1 * self.kl_loss(mu, logvar)

    found = only(audit_module(made(training_step, kl_loss=kl_loss), batch()))
    assert found.where.endswith("kl_loss")
    assert found.verdict == "wrong"
    assert found.audit is not None
    assert found.audit.mistakes[0].id == "mean-over-latent"


def test_the_audit_of_a_method_tells_what_one_batch_cannot():
    """With 8 examples, 8 latents and a step that takes no other batch, 1/8 is either; the function itself tells."""

    def kl_of(self, mu, logvar):
        return terms(mu, logvar).sum() / 8 / mu.shape[1]

    def inline(self, batch, batch_idx):
        mu, logvar = self.encode(batch[0].view(8, DATA))
        kl = terms(mu, logvar).mean()
        return self.beta * kl

    def by_method(self, batch, batch_idx):
        mu, logvar = self.encode(batch[0].view(8, DATA))
        kl = self.kl_of(mu, logvar)
        return self.beta * kl

    found = only(audit_module(made(inline, latent=8), batch(8)))
    assert set(found.mistakes) == {"mean-over-latent", "batch-divided-twice"}
    assert "does not tell these apart" in found.explanation
    assert "8x8" in found.explanation
    audited = only(audit_module(made(by_method, latent=8, kl_of=kl_of), batch(8)))
    assert audited.audit is not None
    assert "batch-divided-twice" not in audited.mistakes


def test_parts_of_the_batch_tell_the_latent_size_from_the_batch_size():
    per_latent = only(audit_module(made(with_kl(lambda m, v: terms(m, v).mean()), latent=8), batch(8)))
    per_batch = only(audit_module(made(with_kl(lambda m, v: terms(m, v).sum() / len(m) ** 2), latent=8), batch(8)))
    assert per_latent.mistakes == ("mean-over-latent",)
    assert per_batch.mistakes == ("batch-divided-twice",)


def test_a_standard_deviation_given_for_a_log_variance_is_found_where_it_is_given():
    def kl_loss(self, mu, logvar):
        return terms(mu, logvar).sum(1).mean()

    def training_step(self, batch, batch_idx):
        mu, logvar = self.encode(batch[0])
        std = (0.5 * logvar).exp()
        kl = self.kl_loss(mu, std)
        return reconstruction(self, batch[0], mu + std * torch.randn_like(std)) + kl

    found = only(audit_module(made(training_step, kl_loss=kl_loss), batch()))
    assert found.mistakes == ("std-as-logvar",)
    assert found.where.endswith("training_step")
    assert found.audit is not None
    assert found.audit.ok


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Independent(d, 1)], ids=["normal", "independent"])
@pytest.mark.parametrize("is_right", [True, False], ids=["right", "swapped"])
def test_swapped_distributions_are_found(wrap, is_right):
    def training_step(self, batch, batch_idx):
        mu, logvar = self.encode(batch[0])
        posterior, prior = wrap(Normal(mu, (0.5 * logvar).exp())), wrap(Normal(torch.zeros_like(mu), 1.0))
        z = posterior.rsample()
        each = kl_divergence(posterior, prior) if is_right else kl_divergence(prior, posterior)
        kl = each.reshape(len(mu), -1).sum(1).mean()
        return reconstruction(self, batch[0], z) + kl

    found = only(audit_module(made(training_step), batch()))
    assert found.verdict == ("right" if is_right else "wrong")
    assert found.mistakes == (() if is_right else ("swapped",))


MISTAKES = {
    "log-term-sign": lambda m, v: 0.5 * (m**2 + v.exp() - 1 + v).sum(1).mean(),
    "half-missing": lambda m, v: 2 * terms(m, v).sum(1).mean(),
    "sign": lambda m, v: -terms(m, v).sum(1).mean(),
    "mean-term-doubled + variance-term-doubled": lambda m, v: (m**2 + v.exp() - 0.5 * v - 0.5).sum(),
    "constant-factor": lambda m, v: 0.37 * terms(m, v).sum(1).mean(),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_catalogue_explains_what_is_wrong(name):
    found = only(audit_module(made(with_kl(MISTAKES[name])), batch()))
    assert found.verdict == "wrong"
    assert found.mistakes == (name,)


def test_the_question_s_own_mistake_is_found_on_the_very_samples():
    def step(weight):
        def training_step(self, batch, batch_idx):
            mu, logvar = self.encode(batch[0])
            q, p = Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)
            z = q.rsample()
            log_q, log_p = q.log_prob(z).sum(1), p.log_prob(z).sum(1)
            kl = (weight(log_q) * (log_q - log_p)).mean()
            return reconstruction(self, batch[0], z) + kl

        return training_step

    assert only(audit_module(made(step(torch.exp)), batch())).mistakes == ("weighted-twice",)
    assert only(audit_module(made(step(torch.ones_like)), batch())).verdict == "right"


def test_each_level_of_a_hierarchy_is_judged():
    def step(reduce):
        def training_step(self, batch, batch_idx):
            mu1, logvar1 = self.encode(batch[0])
            mu2, logvar2 = self.encode(self.dec(mu1))
            q1, p1 = Normal(mu1, (0.5 * logvar1).exp()), Normal(0.3 * mu2, 1.0)
            q2, p2 = Normal(mu2, (0.5 * logvar2).exp()), Normal(torch.zeros_like(mu2), 1.0)
            kl1 = kl_divergence(q1, p1).sum(1).mean()
            kl2 = reduce(kl_divergence(q2, p2))
            kl = kl1 + kl2
            return reconstruction(self, batch[0], q2.rsample()) + kl

        return training_step

    right = audit_module(made(step(lambda kl: kl.sum(1).mean())), batch())
    wrong = audit_module(made(step(lambda kl: kl.mean())), batch())
    assert right.ok, str(right)
    assert {f.name: f.verdict for f in wrong.findings} == {"kl1": "right", "kl2": "wrong", "kl": "wrong"}


# What is right.


def per_element_kld(self, batch, batch_idx):
    mu, log_var = self.encode(batch[0])
    kld = -0.5 * (1 + log_var - mu**2 - log_var.exp())
    return reconstruction(self, batch[0], self.reparameterize(mu, log_var)) + kld.sum(1).mean()


def loss_function(recon_x, x, mu, logvar):
    KLD = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return F.mse_loss(recon_x, x, reduction="sum") + KLD


def torch_example(self, batch, batch_idx):
    mu, logvar = self.encode(batch[0])
    return loss_function(self.dec(self.reparameterize(mu, logvar)), batch[0], mu, logvar)


def single_sample(self, batch, batch_idx):
    mu, log_var = self.encode(batch[0])
    std = torch.exp(log_var / 2)
    q = Normal(mu, std)
    z = q.rsample()
    kl = (q.log_prob(z) - Normal(torch.zeros_like(mu), torch.ones_like(std)).log_prob(z)).sum(-1)
    elbo = (kl + reconstruction(self, batch[0], z)).mean()
    return {"loss": elbo, "kl": kl.mean().detach()}


def dictionaries(self, batch, batch_idx):
    mu, log_sigma = self.encode(batch[0])
    out = {"z_mean": mu, "z_log_sigma": log_sigma}
    losses = {"kl_loss": (0.5 * (mu**2 + (2 * log_sigma).exp() - 1) - log_sigma).sum(1).mean()}
    z = out["z_mean"] + out["z_log_sigma"].exp() * torch.randn_like(mu)
    return reconstruction(self, batch[0], z) + losses["kl_loss"]


def inline_distributions(self, batch, batch_idx):
    mu, logvar = self.encode(batch[0])
    d = Normal(mu, (0.5 * logvar).exp())
    latent_loss = kl_divergence(d, Normal(0.0, 1.0)).sum(-1).mean()
    return reconstruction(self, batch[0], d.rsample()) + latent_loss


def sequences(self, batch, batch_idx):
    x = batch[0][:, None] * torch.arange(1.0, 5.0)[:, None]
    mu, logvar = self.enc(x).chunk(2, dim=-1)
    kl = terms(mu, logvar).sum(-1).mean()
    return reconstruction(self, x, self.reparameterize(mu, logvar)) + kl


def recurrent(self, batch, batch_idx):
    def kld_gauss(mean_1, std_1, mean_2, std_2):
        return (torch.log(std_2 / std_1) + (std_1**2 + (mean_1 - mean_2) ** 2) / (2 * std_2**2) - 0.5).sum()

    h, kld_loss, nll = batch[0], 0, 0
    for _ in range(3):
        enc_mean, enc_log_std = self.encode(h)
        prior_mean, prior_log_std = self.encode(0.5 * h)
        kld_loss = kld_loss + kld_gauss(enc_mean, enc_log_std.exp(), prior_mean, prior_log_std.exp())
        h = self.dec(enc_mean + enc_log_std.exp() * torch.randn_like(enc_mean))
        nll = nll + F.mse_loss(h, batch[0])
    return nll + kld_loss


def distillation(self, batch, batch_idx):
    student, teacher = self.enc(batch[0]), 1.7 * self.enc(batch[0]).detach()
    T = 4.0
    kl = F.kl_div(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1), reduction="batchmean") * T * T
    return self.beta * kl


def negative_sigma(self, batch, batch_idx):
    """`sigma` is the log-variance, as its sign shows."""
    mu, sigma = self.encode(batch[0])
    kl = terms(mu, sigma).sum(1).mean()
    return reconstruction(self, batch[0], self.reparameterize(mu, sigma)) + kl


def helper_with_raw_terms(self, batch, batch_idx):
    def kl_loss(mu, logvar):
        kl = 1 + logvar - mu**2 - logvar.exp()
        return -0.5 * kl.sum(1).mean()

    mu, logvar = self.encode(batch[0])
    return reconstruction(self, batch[0], self.reparameterize(mu, logvar)) + kl_loss(mu, logvar)


def helper_for_independent(self, batch, batch_idx):
    """A mean of `Independent`s' KLs is right; that of plain Normals, which the names alone suggest, is not."""

    def kl_loss(posterior, prior):
        return kl_divergence(posterior, prior).mean()

    q = diagonal_normal(*self.encode(batch[0]))
    return reconstruction(self, batch[0], q.rsample()) + kl_loss(q, standard_normal_like(q))


def balanced(self, batch, batch_idx):
    post, prior = (Categorical(logits=self.enc(scale * batch[0])) for scale in (1, 2))
    kl_lhs = kl_divergence(post, Categorical(logits=prior.logits.detach())).mean()
    kl_rhs = kl_divergence(Categorical(logits=post.logits.detach()), prior).mean()
    kl_loss = 0.2 * kl_lhs + 0.8 * kl_rhs
    return self.beta * kl_loss


RIGHT = [
    per_element_kld,
    torch_example,
    single_sample,
    dictionaries,
    inline_distributions,
    sequences,
    recurrent,
    distillation,
    negative_sigma,
    helper_with_raw_terms,
    helper_for_independent,
    balanced,
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("step", RIGHT, ids=lambda step: step.__name__)
def test_right_steps_raise_no_alarm(step, seed):
    torch.manual_seed(seed)
    report = audit_module(made(step), batch(), seed=seed)
    assert report.ok, str(report)


def test_losses_of_this_library_are_right_by_construction():
    def training_step(self, batch, batch_idx):
        x = batch[0].sigmoid()
        mu, logvar = self.encode(x)
        q = diagonal_normal(mu, logvar)
        kl = self.kl(q, standard_normal_like(q))
        sampled_kl = self.sampled(Normal(mu, 1.0), Laplace(torch.zeros_like(mu), 1.0)).mean()
        elbo = self.elbo.from_tensors(self.dec(q.rsample()), x, mu, logvar, "bernoulli_logits")
        kl_of_elbo = elbo.kl
        self.log_dict({"kl": kl, "kl_sampled": sampled_kl.item()})
        return elbo.loss + kl + sampled_kl + kl_of_elbo

    module = made(training_step, pl.LightningModule)
    module.kl, module.elbo, module.sampled = AutoKL(), ELBOLoss(), MonteCarloKL(4, reduction="none")
    report = audit_module(module, batch())
    assert report.ok, str(report)
    assert sorted(f.name for f in report.findings) == ["self.elbo.kl", "self.kl", "self.sampled"]
    exact = next(f for f in report.findings if f.name == "self.kl")
    assert exact.got == pytest.approx(exact.expected, rel=1e-5)
    assert all("by construction" in f.explanation for f in report.findings)
    assert not any(hooked._forward_hooks for hooked in module.modules())


def test_a_weight_with_a_name_is_no_mistake_and_one_without_is_measured():
    def training_step(self, batch, batch_idx):
        mu, logvar = self.encode(batch[0])
        regulariser = terms(mu, logvar).sum(1).mean()
        self.log("kl", weight(self) * regulariser)
        return reconstruction(self, batch[0], self.reparameterize(mu, logvar)) + regulariser

    weight = lambda vae: vae.beta
    named = only(audit_module(made(training_step, pl.LightningModule), batch()))
    assert named.verdict == "right"
    assert "0.3 times the KL, which is" in named.explanation
    weight = lambda vae: 0.7
    unnamed = only(audit_module(made(training_step, pl.LightningModule), batch()))
    assert unnamed.mistakes == ("constant-factor",)
    assert unnamed.ratio == pytest.approx(0.7, rel=1e-3)


def test_free_bits_are_not_called_wrong():
    step = with_kl(lambda m, v: terms(m, v).clamp(min=0.3).sum(1).mean())
    assert only(audit_module(made(step), batch())).verdict == "cannot tell"


# The gradient.


def test_a_detached_kl_does_not_reach_the_loss():
    found = only(audit_module(made(with_kl(lambda m, v: terms(m, v).sum(1).mean().detach())), batch()))
    assert found.mistakes == ("does-not-reach-the-loss",)
    assert "detached" in found.explanation


def test_a_kl_that_is_left_out_of_the_loss_does_not_reach_it():
    def training_step(self, batch, batch_idx):
        mu, logvar = self.encode(batch[0])
        z = self.reparameterize(mu, logvar)
        kl = terms(mu, logvar).sum(1).mean()
        return reconstruction(self, batch[0], z) + 0 * kl.item()

    found = only(audit_module(made(training_step), batch()))
    assert found.mistakes == ("does-not-reach-the-loss",)
    assert "no part" in found.explanation


def test_a_kl_that_is_logged_alone_is_right_where_the_loss_has_one_without_a_name():
    def training_step(self, batch, batch_idx):
        mu, logvar = self.encode(batch[0])
        z = self.reparameterize(mu, logvar)
        with torch.no_grad():
            self.log("kl", terms(mu, logvar).sum(1).mean())
        return reconstruction(self, batch[0], z) + terms(mu, logvar).sum(1).mean()

    report = audit_module(made(training_step, lp.LightningModule), batch())
    assert only(report).name == "log('kl')"
    assert report.ok


def test_a_detached_parameter_is_found():
    found = only(audit_module(made(with_kl(lambda m, v: terms(m, v.detach()).sum(1).mean())), batch()))
    assert found.mistakes == ("parameter-without-gradient",)


# Steps whose names determine nothing.


def nameless(self, batch, batch_idx):
    a, b = self.encode(batch[0])
    return reconstruction(self, batch[0], a + b.exp() * torch.randn_like(a)) + terms(a, 2 * b).mean()


def test_a_step_without_names_says_what_to_do():
    report = audit_module(made(nameless), batch())
    assert (report.ok, report.findings) == (False, ())
    assert "pairs=" in str(report)


@pytest.mark.parametrize(("reduce", "verdict"), [("sum", "right"), ("mean", "wrong")])
def test_pairs_are_compared_with_what_has_their_name(reduce, verdict):
    def training_step(self, batch, batch_idx):
        a, b = self.encode(batch[0])
        rate = getattr(terms(a, 2 * b), reduce)(1).mean()
        return reconstruction(self, batch[0], a) + rate

    def pairs(module, batch):
        a, b = module.encode(batch[0])
        return {"rate": (Normal(a, b.exp()), Normal(0.0, 1.0))}

    found = only(audit_module(made(training_step), batch(), pairs=pairs))
    assert (found.name, found.verdict) == ("rate", verdict)
    assert found.mistakes == (() if reduce == "sum" else ("mean-over-latent",))


def test_pairs_are_compared_with_any_kl_where_none_has_their_name():
    def training_step(self, batch, batch_idx):
        a, b = self.encode(batch[0])
        kl = (0.5 * (a**2 + (2 * b).exp() - 1) - b).mean()
        return self.beta * kl

    pairs = lambda module, batch: {"z": diagonal_pair(*module.encode(batch[0]))}
    diagonal_pair = lambda a, b: (diagonal_normal(a, 2 * b), standard_normal_like(diagonal_normal(a, b)))
    assert only(audit_module(made(training_step), batch())).verdict == "cannot tell"
    assert only(audit_module(made(training_step), batch(), pairs=pairs)).mistakes == ("mean-over-latent",)


def test_pairs_that_raise_are_reported():
    report = audit_module(made(nameless), batch(), pairs=lambda module, batch: 1 / 0)
    assert "pairs raises ZeroDivisionError" in str(report)


def test_q_at_p_cannot_be_judged():
    module = made(with_kl(lambda m, v: terms(m, v).mean()))
    for parameter in module.enc.parameters():
        nn.init.zeros_(parameter)
    assert only(audit_module(module, batch())).verdict == "cannot tell"


def test_a_step_that_raises_is_reported_with_what_was_seen():
    def training_step(self, batch, batch_idx):
        mu, logvar = self.encode(batch[0])
        kl = terms(mu, logvar).mean()
        return kl / self.trainer.max_epochs

    report = audit_module(made(training_step, pl.LightningModule), batch())
    assert "training_step raises RuntimeError" in str(report)
    assert not report.ok
    assert only(report).mistakes == ("mean-over-latent",)


def test_a_batch_that_does_not_fit_is_reported():
    report = audit_module(made(with_kl(lambda m, v: terms(m, v).mean())), (torch.zeros(3, DATA + 1), None))
    assert "training_step raises" in report.reason
    assert report.findings == ()


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="training_step"):
        audit_module(nn.Linear(2, 2), batch())


# State and random streams.


def streams():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("holds_a_graph", [False, True], ids=["copied", "in place"])
def test_module_and_random_streams_stay_as_they_were(holds_a_graph):
    def training_step(self, batch, batch_idx):
        mu, logvar = self.encode(self.norm(batch[0]) + random.random() + np.random.rand())
        self.steps += 1
        self.eval()
        with torch.no_grad():
            self.dec.weight.mul_(2)
        self.kl = terms(mu, logvar).sum(1).mean()
        self.log("kl", self.kl)
        loss = reconstruction(self, batch[0], self.reparameterize(mu, logvar)) + self.kl
        loss.backward(retain_graph=True)
        return loss

    module = made(training_step, pl.LightningModule)
    module.norm, module.steps = nn.BatchNorm1d(DATA), 0
    if holds_a_graph:
        module.kl = module.enc.weight.sum()  # a tensor of a graph cannot be copied
    before = {name: t.clone() for name, t in module.state_dict().items()}
    data = batch()
    attributes, state = dict(vars(module)), streams()
    assert only(report := audit_module(module, data)).verdict == "right", str(report)
    assert streams() == state
    assert {name: torch.equal(t, before[name]) for name, t in module.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert vars(module).keys() == attributes.keys()
    assert all(vars(module)[name] is value for name, value in attributes.items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert module.norm.training


def test_the_same_seed_gives_the_same_report():
    module, data = made(single_sample), batch()
    assert audit_module(module, data, seed=3).to_dict() == audit_module(module, data, seed=3).to_dict()


def test_a_report_is_plain_data_and_reads():
    report = audit_module(made(with_kl(lambda m, v: terms(m, v).mean())), batch())
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ok"] is False
    assert plain["findings"][0]["mistakes"] == ["mean-over-latent"]
    assert "kl is WRONG" in str(report)
    assert "ratio 0.2" in str(report)
    assert isinstance(report, ModuleReport)
