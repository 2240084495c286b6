"""What an ELBO masks is masked for those who watch its KL."""

import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.distributions import Independent, Normal

from tests.callbacks.training import LIGHTNING_SAYS, fit
from torch_klloss import AnalyticKL, AutoKL, ELBOLoss, MonteCarloKL, diagonal_normal, standard_normal_like
from torch_klloss.callbacks import EstimatorGap, PosteriorCollapse
from torch_klloss.elbo import divergence

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


def logged(is_masked, kl=None, from_tensors=True):
    module = Masked(kl or AutoKL(), is_masked, from_tensors)
    return {k: v.item() for k, v in fit(module, [EstimatorGap(1), PosteriorCollapse(1)], 2).callback_metrics.items()}


EXACT = ("kl/loss.kl/value", *(f"collapse/loss.kl/kl/{unit}" for unit in range(3)), "collapse/loss.kl/active_units")


@pytest.mark.parametrize("from_tensors", [True, False])
@pytest.mark.parametrize("kl", [AutoKL(), AnalyticKL(reduction="sum"), MonteCarloKL(64)], ids=repr)
def test_watchers_count_the_examples_that_the_elbo_counts(kl, from_tensors):
    masked, alone = (logged(is_masked, kl, from_tensors) for is_masked in (True, False))
    assert masked.keys() == alone.keys()
    is_sampled = isinstance(kl, MonteCarloKL)
    for key in EXACT[1:] if is_sampled else EXACT:
        # the two draw for different numbers of examples, and step on what they drew
        assert masked[key] == pytest.approx(alone[key], rel=0.05 if is_sampled else 1e-5), key
    assert abs(masked["kl/loss.kl/gap_z"]) < 6


def test_a_mask_that_is_kept_back_is_seen(monkeypatch):
    """The twin: a KL that is shown without it."""
    monkeypatch.setattr(divergence, "show", lambda kl, q, p, batch: kl(q, p))
    masked, alone = logged(True, from_tensors=False), logged(False, from_tensors=False)
    assert masked["kl/loss.kl/value"] > 1.1 * alone["kl/loss.kl/value"]
