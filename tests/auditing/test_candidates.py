"""The predictions of the catalogue, which audits share."""

import pytest
import torch

from torch_klloss import audit
from torch_klloss.auditing.explanation import candidates


def half(mean, logvar):
    z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    return 0.5 * (0.5 * z**2 - 0.5 * (z - mean) ** 2 / logvar.exp() - 0.5 * logvar).sum(-1).mean()


def absolute(mean, logvar):
    z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    return (0.5 * z**2 - 0.5 * (z - mean) ** 2 / logvar.exp() - 0.5 * logvar).abs().sum(-1).mean()


@pytest.fixture(autouse=True)
def _nothing_kept():
    candidates._predictions.cache_clear()


def test_an_audit_says_the_same_after_another_loss_of_the_same_signature():
    alone = audit(absolute, budget=320)
    candidates._predictions.cache_clear()
    audit(half, budget=320)
    misses = candidates._predictions.cache_info().misses
    after = audit(absolute, budget=320)
    assert after.to_dict() == alone.to_dict()
    assert after.mistakes[0].id == "absolute-value"
    assert candidates._predictions.cache_info().misses == misses


def test_predictions_are_kept_for_these_very_probes_and_so_many_of_them_alone():
    def wrong(mean, logvar):
        return -0.5 * (1 + logvar - mean**2 - logvar.exp()).mean()

    for seed in range(20):
        assert audit(wrong, seed=seed).mistakes[0].id == "mean-over-latent"
    info = candidates._predictions.cache_info()
    assert info.misses == 20
    assert info.currsize == info.maxsize < 20
