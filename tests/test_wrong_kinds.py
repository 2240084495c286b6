"""Arguments of a wrong kind: a TypeError or ValueError that names the argument."""

import pytest
import torch
from torch.distributions import Independent, Normal

from torch_klloss import AutoKL, ELBOLoss, MonteCarloKL, categorical, diagonal_normal, kl_from_log_probs
from torch_klloss.elbo import IWAELoss
from torch_klloss.methods import MonteCarlo
from torch_klloss.samplers import IID
from torch_klloss.testing import check_kl

LOGS = torch.randn(4, 6)
NORMAL = Independent(Normal(torch.zeros(4, 3), 1.0), 1)
X = torch.zeros(4, 3)
NO_TENSOR = ([0.0, 1.0], "x", 3, None, Normal(0.0, 1.0), torch.zeros(4, 3, dtype=torch.complex64))
NO_GENERATOR = (3, "x", [1], torch.rand)
NO_MASK = ([True, False], "x", 1.0, torch.ones(7, dtype=torch.bool))
NO_WORD = ("bogus", 3, ["mean"], {"k1"})
NO_DIM = (7, -7, 1.0, "x", None, [0], True)


def logs(**arguments):
    return kl_from_log_probs(**({"log_q": LOGS, "log_p": LOGS} | arguments))


def elbo(**arguments):
    return ELBOLoss().from_tensors(**({"recon": X, "x": X, "mean": X, "logvar": X} | arguments))


def vae(**arguments):
    return ELBOLoss()(**({"p_x": NORMAL, "x": X, "q": NORMAL, "p": NORMAL} | arguments))


def iwae(**arguments):
    defaults = {"likelihood": lambda z: Independent(Normal(z, 1.0), 1), "x": X, "q": NORMAL, "p": NORMAL}
    return IWAELoss(2)(**(defaults | arguments))


def auto(**arguments):
    return AutoKL()(**({"q": NORMAL, "p": NORMAL} | arguments))


def sampled(**arguments):
    return MonteCarloKL(2)(**({"q": NORMAL, "p": NORMAL} | arguments))


def checked(**arguments):
    return check_kl(**({"q": NORMAL, "p": NORMAL} | arguments))


CASES = [
    *((logs, "log_q", bad) for bad in (*NO_TENSOR, torch.zeros(4, 6, dtype=torch.int64))),
    *((logs, "log_p", bad) for bad in (*NO_TENSOR, torch.zeros(4, 6, dtype=torch.int64))),
    *((logs, "log_behavior", bad) for bad in ([0.0], "x", 3, torch.zeros(5))),
    *((logs, "mask", bad) for bad in NO_MASK),
    *((logs, "dim", bad) for bad in NO_DIM),
    *((logs, "value", bad) for bad in (*NO_WORD, None)),
    *((logs, "gradient", bad) for bad in NO_WORD),
    *((logs, "normalizer", bad) for bad in ("x", [1.0], True, float("nan"))),
    *((elbo, name, bad) for name in ("recon", "x", "mean", "logvar") for bad in NO_TENSOR),
    *((elbo, "likelihood", bad) for bad in (*NO_WORD, None)),
    *((elbo, "mask", bad) for bad in NO_MASK),
    *((elbo, "lengths", bad) for bad in ([1, 2], "x", 3, torch.ones(4))),
    *((vae, "x", bad) for bad in NO_TENSOR),
    *((vae, "p_x", bad) for bad in (X, "x", None, 3)),
    *((vae, "mask", bad) for bad in NO_MASK),
    *((iwae, "x", bad) for bad in NO_TENSOR),
    *((iwae, "mask", bad) for bad in NO_MASK),
    *((iwae, "generator", bad) for bad in NO_GENERATOR),
    *((loss, "generator", bad) for loss in (auto, sampled) for bad in NO_GENERATOR),
    *((loss, "mask", bad) for loss in (auto, sampled) for bad in NO_MASK),
    *((auto, name, bad) for name in ("q", "p") for bad in (X, "x", None, 3, Normal)),
    *((lambda mean: diagonal_normal(mean, X), "mean", bad) for bad in NO_TENSOR),
    *((lambda logvar: diagonal_normal(X, logvar), "logvar", bad) for bad in NO_TENSOR),
    *((lambda batch_dims: diagonal_normal(X, X, batch_dims), "batch_dims", bad) for bad in (3, -1, 1.0, "x", None)),
    *((categorical, "logits", bad) for bad in NO_TENSOR),
    *((checked, name, bad) for name in ("q", "p") for bad in (X, "x", None, 3)),
    *((checked, "kl", bad) for bad in (None, "closed_form", 3, X)),
    *((checked, "num_samples", bad) for bad in ("x", None, 0, 1.5, True, [8])),
    *((checked, "seed", bad) for bad in ("x", None, 1.5, True, [0])),
    *((lambda sampler: MonteCarlo(sampler=sampler), "sampler", bad) for bad in ("iid", 3, IID, [IID()])),
]


@pytest.mark.parametrize(("call", "name", "bad"), CASES, ids=lambda v: getattr(v, "__name__", repr(v)[:24]))
def test_the_error_is_ours_and_names_the_argument(call, name, bad):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b") as caught:
        call(bad) if call is categorical else call(**{name: bad})
    assert "torch_klloss" in str(caught.traceback[-1].path)


def test_a_dimension_of_tokens_out_of_range_is_named():
    for bad in (5, -5, 1.0, "x"):
        with pytest.raises(ValueError, match="token_dim must be a dimension of log_q"):
            logs(token_dim=bad, level="token")
