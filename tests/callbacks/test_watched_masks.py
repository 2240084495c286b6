"""Masks of an ELBOLoss, as the callbacks that observe its KL see them."""

import math
from dataclasses import replace
from functools import partial

import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.distributions import Distribution, Independent, Normal

from tests.callbacks.training import LIGHTNING_SAYS, fit
from torch_klloss import AnalyticKL, AutoKL, ELBOLoss, KLLoss, MonteCarloKL, diagonal_normal, standard_normal_like
from torch_klloss.callbacks import EstimatorGap, KLRoute, PosteriorCollapse

pytestmark = LIGHTNING_SAYS

KEEP = torch.arange(8) < 3  # of a batch of 8


class Masked(pytorch_lightning.LightningModule):
    """Trains on the first three examples of a batch: masked the others, or left them out."""

    def __init__(self, kl, is_masked, from_tensors):
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.decoder = nn.Linear(5, 6), nn.Linear(3, 5)
        self.loss = ELBOLoss(kl)
        self.is_masked, self.from_tensors = is_masked, from_tensors

    def training_step(self, batch, batch_idx):
        x, mask = (batch[0], KEEP) if self.is_masked else (batch[0][KEEP], None)
        mean, logvar = self.encoder(x).chunk(2, -1)
        if self.is_masked:
            mean, logvar = (torch.where(KEEP.unsqueeze(-1), t, 3.0) for t in (mean, logvar))  # padding
        if self.from_tensors:
            return self.loss.from_tensors(self.decoder(mean), x, mean, logvar, "gaussian", mask=mask).loss
        q = diagonal_normal(mean, logvar)
        p_x = Independent(Normal(self.decoder(mean), 1.0), 1)
        return self.loss(p_x, x, q, standard_normal_like(q), mask=mask).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def logged(is_masked, kl=None, from_tensors=True, steps=2):
    module = Masked(kl or AutoKL(), is_masked, from_tensors)
    metrics = fit(module, [EstimatorGap(1), PosteriorCollapse(1)], steps).callback_metrics
    return {k: v.item() for k, v in metrics.items()}


EXACT = ("kl/loss.kl/value", *(f"collapse/loss.kl/kl/{unit}" for unit in range(3)), "collapse/loss.kl/active_units")


@pytest.mark.parametrize("from_tensors", [True, False])
@pytest.mark.parametrize("kl", [AutoKL(), AnalyticKL(reduction="sum"), MonteCarloKL(64)], ids=repr)
def test_watchers_count_the_examples_that_the_elbo_counts(kl, from_tensors):
    # What is sampled draws for different numbers of examples: after a step on that, the weights are not the same.
    is_sampled = isinstance(kl, MonteCarloKL)
    steps = 1 if is_sampled else 2
    masked, alone = (logged(is_masked, kl, from_tensors, steps) for is_masked in (True, False))
    assert masked.keys() == alone.keys()
    for key in EXACT[1:] if is_sampled else EXACT:
        assert masked[key] == pytest.approx(alone[key], rel=1e-5), key
    assert abs(masked["kl/loss.kl/gap_z"]) < 6


def told_with(monkeypatch, change):
    """Tell the observers of the batch that `change` makes of the right one."""
    tell = KLLoss.tell
    monkeypatch.setattr(KLLoss, "tell", lambda loss, q, p, batch, *rest: tell(loss, q, p, change(batch), *rest))


def test_a_mask_that_is_kept_back_is_seen(monkeypatch):
    """The twin: a KL that is told without it."""
    told_with(monkeypatch, lambda batch: replace(batch, weights=None))
    masked, alone = logged(True, from_tensors=False), logged(False, from_tensors=False)
    assert all(masked[key] != pytest.approx(alone[key], rel=1e-2) for key in EXACT[1:4])


BATCH, TIME, LATENT = 6, 5, 3
LENGTHS = torch.tensor([5, 2, 0, 3, 1, 4])
STEPS = torch.arange(TIME) < LENGTHS.unsqueeze(-1)
SHARES = STEPS * torch.tensor([1.0, 0.25, 0.0, 2.0, 0.5])
MASKS = {
    "steps": {"mask": STEPS},
    "lengths": {"lengths": LENGTHS},
    "weighted steps": {"mask": SHARES},
    "examples": {"mask": STEPS[:, 1]},
    "weighted examples": {"mask": SHARES[:, 0] + SHARES[:, 3]},
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


class Sequences(pytorch_lightning.LightningModule):
    """Has a posterior a step, that does not learn; what is masked is NaN. Keeps the KL that the loss names."""

    def __init__(self, kl, mask, from_tensors=True, compiled=False):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        shape = (BATCH, TIME, LATENT)
        self.mean, self.logvar = (0.7 * torch.randn(*shape, generator=generator) for _ in range(2))
        self.shift = nn.Parameter(torch.zeros(()))
        self.loss, self.mask, self.from_tensors = ELBOLoss(kl), mask, from_tensors
        self.call = torch.compile(self.loss, backend="eager") if compiled else self.loss
        self.kl = math.nan

    @property
    def weights(self):
        weights = STEPS if "lengths" in self.mask else self.mask["mask"]
        return weights.float() if weights.dim() == 2 else weights.float().unsqueeze(-1).expand(BATCH, TIME)

    def training_step(self, batch, batch_idx):
        keep = (self.weights != 0).unsqueeze(-1)
        mean, logvar = (torch.where(keep, t + self.shift, math.nan) for t in (self.mean, self.logvar))
        x = torch.zeros(BATCH, TIME, 2)
        if self.from_tensors:
            terms = self.loss.from_tensors(x, x, mean, logvar, "gaussian", **self.mask)
        else:
            q = diagonal_normal(mean.nan_to_num(), logvar.nan_to_num(), batch_dims=2)
            terms = self.call(Independent(Normal(x, 1.0), 1), x, q, standard_normal_like(q), **self.mask)
        self.kl = terms.kl.item()
        return terms.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def watch(module, *callbacks):
    metrics = fit(module, list(callbacks), 1).callback_metrics
    return {key: value.item() for key, value in metrics.items()}


@every_mask
@pytest.mark.parametrize("from_tensors", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("cls", [AutoKL, AnalyticKL, partial(MonteCarloKL, 64)], ids=["auto", "analytic", "sampled"])
def test_what_is_watched_is_the_kl_of_the_terms(cls, reduction, from_tensors, mask):
    """Against the formula: the weighted sum over the steps, over the number of sequences or over their weights."""
    module = Sequences(cls(reduction=reduction), mask, from_tensors)
    got = watch(module, EstimatorGap(1, num_samples=4096, side_by_side=["exact"]))
    mean, logvar, w = module.mean.double(), module.logvar.double(), module.weights.double()
    steps = (0.5 * (mean**2 + logvar.exp() - 1 - logvar)).sum(-1)
    is_of_steps = mask.get("mask", LENGTHS).dim() == 2 or "lengths" in mask
    count = 1.0 if reduction == "sum" else (w != 0).any(-1).sum() if is_of_steps else w[:, 0].sum()
    eps = torch.finfo(torch.float32).eps
    assert got["kl/loss.kl/value"] == pytest.approx(module.kl, rel=16 * eps)
    assert got["kl/loss.kl/exact"] == pytest.approx(((w * steps).sum() / count).item(), rel=16 * eps)
    assert abs(got["kl/loss.kl/gap_z"]) < 6
    # log q - log p = ½ (z² - ε²) + const has the variance (μσ)² + ½ (σ² - 1)², a kurtosis below 15, and one draw is one
    # of S: the relative error of the standard error that they give is below ½ √(14 / (S · steps)).
    variance = ((mean * (0.5 * logvar).exp()) ** 2 + 0.5 * (logvar.exp() - 1) ** 2).sum(-1)
    num_samples = 64 if isinstance(module.loss.kl, MonteCarloKL) else 4096
    error = ((w**2 * variance).sum() / num_samples).sqrt() / count
    tolerance = 5 * 0.5 * math.sqrt(14 / (num_samples * (w != 0).sum()))
    assert got["kl/loss.kl/gap_std_error"] == pytest.approx(error.item(), rel=tolerance)


@every_mask
@pytest.mark.parametrize("from_tensors", [True, False])
def test_the_units_are_those_of_what_is_masked(from_tensors, mask):
    """Steps under a mask of steps: as many units whatever the length."""
    module = Sequences(AutoKL(), mask, from_tensors)
    collapse = PosteriorCollapse(1)
    watch(module, collapse, KLRoute(1))
    (row,) = collapse.history["loss.kl"]
    mean, logvar, w = module.mean.double(), module.logvar.double(), module.weights.double().unsqueeze(-1)
    if mask.get("mask", STEPS).dim() == 1:  # the examples are sequences
        mean, logvar, w = mean.flatten(1), logvar.flatten(1), w[:, 0]
    else:
        mean, logvar, w = mean.flatten(0, 1), logvar.flatten(0, 1), w.flatten(0, 1)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    assert row["kl"] == pytest.approx(((w * kl).sum(0) / w.sum()).tolist(), rel=1e-5)
    centre = (w * mean).sum(0) / w.sum()
    assert row["variances"] == pytest.approx(((w * (mean - centre) ** 2).sum(0) / w.sum()).tolist(), rel=1e-5)
    assert 0 <= row["mutual_information"] <= math.log((w != 0).sum())


@pytest.mark.filterwarnings("ignore:.*samples KL")  # KLRoute is right
@every_mask
@pytest.mark.parametrize("kl", [AutoKL(), MonteCarloKL(2)], ids=["exact", "sampled"])
def test_training_is_the_same_watched_or_not_under_every_mask(kl, mask):
    shifts = []
    for callbacks in ([], [EstimatorGap(1), PosteriorCollapse(1), KLRoute(1)]):
        module = Sequences(kl, mask)
        fit(module, callbacks, 3)
        shifts.append((module.shift.item(), module.kl, torch.rand(()).item()))
    assert shifts[0] == shifts[1]


def test_weights_that_are_taken_for_a_mask_are_seen(monkeypatch):
    """The twin: a KL that is told without its weights."""
    module = Sequences(AutoKL(), MASKS["weighted examples"])
    told_with(monkeypatch, lambda batch: replace(batch, weights=batch.weights != 0))
    got = watch(module, EstimatorGap(1, side_by_side=["exact"]))
    assert got["kl/loss.kl/exact"] != pytest.approx(module.kl, rel=1e-2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input's
def test_a_compiled_loss_shows_its_steps(monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", Distribution._validate_args)  # Dynamo turns it off for good
    module = Sequences(AutoKL(), MASKS["weighted steps"], from_tensors=False, compiled=True)
    got = watch(module, EstimatorGap(1))
    assert got["kl/loss.kl/value"] == pytest.approx(module.kl, rel=1e-5)
