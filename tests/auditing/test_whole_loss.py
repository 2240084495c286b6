"""The whole loss of a VAE, loss_function(recon_x, x, mu, logvar): its KL is judged, wherever that is."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional

from torch_klloss import audit


def kl(mu, logvar):
    return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def wrong_kl(mu, logvar):
    return -0.5 * torch.mean(1 + logvar - mu.pow(2) - logvar.exp())


def of_flat_images(recon_x, x, mu, log_var):  # as in the examples of PyTorch
    return functional.binary_cross_entropy(recon_x, x.view(-1, 784), reduction="sum") + kl(mu, log_var)


def of_logits(logits, target, mu, logvar):
    return functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") + kl(mu, logvar)


def of_colours(x_hat, x, mean, logvar):
    return functional.mse_loss(x_hat, x.view(-1, 3, 32, 32), reduction="sum") + kl(mean, logvar)


def of_parts(x, x_recon, mu, logvar):
    reconstruction = functional.mse_loss(x_recon, x, reduction="sum")
    return {"loss": reconstruction + kl(mu, logvar), "recon": reconstruction, "kld": kl(mu, logvar).detach()}


def of_two_parts(recon, data, mu, sigma):
    return functional.l1_loss(recon, data), kl(mu, 2 * sigma.log())


class Loss(nn.Module):
    def forward(self, output, target, mu, logvar, beta=1.0):
        return functional.mse_loss(output, target, reduction="sum") + beta * kl(mu, logvar)


RIGHT = {
    of_flat_images: "at recon_x = x = 0,",
    of_logits: "at target = 0 and logits = -200 (logits),",
    of_colours: "at x_hat = x = 0,",
    of_parts: "in what it returns as 'loss': at x_recon = x = 0,",
    of_two_parts: "in what it returns as 1: at recon = data = 0,",
    Loss(): "at output = target = 0,",
}


@pytest.mark.parametrize(("fn", "where"), RIGHT.items(), ids=lambda value: getattr(value, "__name__", None))
def test_a_right_loss_is_right_and_what_was_judged_is_said(fn, where):
    report = audit(fn)
    assert report.ok, report
    assert report.remarks[0].startswith("judged is its KL")
    assert where in report.remarks[0]


def gaussian(recon, x):
    return -Normal(recon, 1.0).log_prob(x)


def of_pixels_with_a_constant(recon_x, x, mu, logvar):
    return gaussian(recon_x, x.view(-1, 784)).sum() + kl(mu, logvar)


def of_a_mean_with_a_constant(recon_x, x, mu, sigma):
    return gaussian(recon_x, x).mean() + kl(mu, 2 * sigma.log()) / len(x)


def of_guarded_logarithms(recon_x, x, mu, logvar):
    entropy = x * (recon_x + 1e-6).log() + (1 - x) * (1 - recon_x + 1e-6).log()
    return kl(mu, logvar) - entropy.sum()


@pytest.mark.parametrize("fn", [of_pixels_with_a_constant, of_a_mean_with_a_constant, of_guarded_logarithms])
def test_a_constant_of_the_reconstruction_is_none_of_the_kl(fn):
    report = audit(fn)
    assert report.ok, report
    assert "less the constant that it has there" in report.remarks[0]


def without_its_one(recon_x, x, mu, logvar):
    return gaussian(recon_x, x).sum() - 0.5 * torch.sum(logvar - mu.pow(2) - logvar.exp())


def of_mean_kl_and_a_constant(recon_x, x, mu, logvar):
    return gaussian(recon_x, x).sum() + wrong_kl(mu, logvar)


def with_a_floor(recon_x, x, mu, logvar):
    each = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=-1)
    return functional.mse_loss(recon_x, x, reduction="sum") / len(x) + each.clamp(min=2.0).mean()


def of_mean_kl(recon_x, x, mu, logvar):
    return functional.binary_cross_entropy(recon_x, x, reduction="sum") + wrong_kl(mu, logvar)


def with_the_sign(recon_x, x, mu, logvar):
    return functional.mse_loss(recon_x, x, reduction="sum") - kl(mu, logvar)


def of_wrong_second_part(recon_x, x, mu, logvar):
    return functional.mse_loss(recon_x, x, reduction="sum"), wrong_kl(mu, logvar)


@pytest.mark.parametrize(
    ("fn", "mistake"),
    [
        (of_mean_kl, "mean-over-latent"),
        (of_mean_kl_and_a_constant, "mean-over-latent"),
        (without_its_one, "constant-missing"),
        (with_a_floor, "free-nats"),
        (with_the_sign, "sign"),
        (of_wrong_second_part, "mean-over-latent"),
    ],
)
def test_a_wrong_kl_in_it_is_named(fn, mistake):
    report = audit(fn)
    assert report.verdict.startswith("wrong value")
    assert mistake in {found.id for found in report.mistakes}, report


def test_a_loss_that_takes_no_images_says_why():
    def loss_function(recon_x, x, mu, logvar):
        raise RuntimeError("no images of this shape")

    report = audit(loss_function)
    assert report.verdict == "not judged"
    assert "no images of this shape" in report.reason


def test_a_module_with_a_training_step_is_told_of_audit_module():
    class VAE(nn.Linear):
        def training_step(self, batch, batch_idx):
            return batch

    assert audit(VAE(2, 2)).reason.endswith("audit_module(module, batch)")
    assert "audit_module" not in audit(nn.Linear(2, 2)).reason


def test_four_tensors_of_two_normals_stay_what_they_are():
    def between(mu_q, logvar_q, mu_p, logvar_p):
        terms = logvar_p - logvar_q + (logvar_q.exp() + (mu_q - mu_p) ** 2) / logvar_p.exp() - 1
        return 0.5 * terms.sum(-1).mean()

    report = audit(between)
    assert report.ok
    assert report.signature == "means_logvars"
    assert not [remark for remark in report.remarks if "judged is its KL" in remark]
