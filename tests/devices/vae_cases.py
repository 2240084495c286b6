"""Cases of the loss of a VAE: each option, likelihood, schedule and controller, and the other parts of `elbo`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import torch
import torch.distributions as dist
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import functional

from tests.devices.pairs import BUILDS, WEIGHTS, Build, Case, D, N, by_hand, event, numbers, vae
from torch_klloss import (
    AnalyticKL,
    ELBOLoss,
    MonteCarloKL,
    schedules,
)
from torch_klloss.elbo import GECO, IWAELoss, PIControl, decompose_kl
from torch_klloss.elbo.importance import IWAEGradient
from torch_klloss.elbo.likelihoods import LikelihoodName


def image_tensors(likelihood: str) -> list[Tensor]:
    recon, mean, logvar, x = numbers((N, 5), (N, D), (N, D), (N, 5))
    if likelihood == "bernoulli":
        recon = (1 + 0.9 * recon) / 2
    return [recon, mean, logvar, (x > 0).double() if "bernoulli" in likelihood else x]


def elbo_by_hand(recon: Tensor, mean: Tensor, logvar: Tensor, x: Tensor, *_: Tensor) -> Tensor:
    """Return the lines that people write for the loss of a VAE."""
    nll = functional.binary_cross_entropy_with_logits(recon, x, reduction="sum")
    return (nll - 0.5 * (1 + logvar - mean**2 - logvar.exp()).sum()) / len(x)


def elbo_case(name: str, loss: ELBOLoss, likelihood: LikelihoodName = "bernoulli_logits", **options: Any) -> Case:
    def step(loss: ELBOLoss, recon: Tensor, mean: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
        return loss.from_tensors(recon, x, mean, logvar, likelihood, step=3).loss

    return Case(f"ELBOLoss: {name}", image_tensors(likelihood), step, elbo_by_hand, [3], module=loss, **options)


def elbo_of_distributions(name: str, loss: ELBOLoss, build: Build, tensors: list[Tensor]) -> Case:
    recon, *_, x = image_tensors("bernoulli_logits")

    def step(loss: ELBOLoss, recon: Tensor, x: Tensor, *t: Tensor) -> Tensor:
        p_x = event(dist.Bernoulli(logits=recon, validate_args=False))
        return loss(p_x, x, *build(*t), step=3).loss

    def peer(recon: Tensor, x: Tensor, *t: Tensor) -> Tensor:
        return elbo_by_hand(recon, t[0], t[1], x)

    return Case(f"ELBOLoss: {name}", [recon, x, *tensors], step, peer, [1], module=loss)


ELBO_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "beta": {"beta": 0.5},
    "GECO": {"beta": GECO(tolerance=2.0)},
    "PIControl": {"beta": PIControl(target=1.0)},
    "free_nats": {"free_nats": 0.3},
    "free_nats_per dimension": {"free_nats": 0.1, "free_nats_per": "dimension"},
    "free_nats_groups": {"free_nats": 0.1, "free_nats_per": "group", "free_nats_groups": 3},
    "capacity": {"capacity": 0.5},
    "kl": {"kl": AnalyticKL(reduction="sum")},
}


def schedule(kind: type[Any]) -> Any:
    return kind(1.0) if kind is schedules.Constant else kind(steps=10)


SCHEDULES = [
    kind
    for kind in vars(schedules).values()
    if isinstance(kind, type) and issubclass(kind, schedules.Schedule) and not kind.__name__.startswith("_")
    if kind is not schedules.Schedule
]


def vaes() -> Iterator[Case]:
    """Every option of ELBOLoss, likelihood, schedule and controller, and the other parts of `torch_klloss.elbo`."""
    for likelihood in get_args(LikelihoodName):
        yield elbo_case(f"likelihood={likelihood}", ELBOLoss(), likelihood)
    for name, options in ELBO_OPTIONS.items():
        yield elbo_case(name, ELBOLoss(**options))
        yield elbo_of_distributions(f"{name}, of distributions", ELBOLoss(**options), vae, BUILDS["vae"][1])
    for kind in SCHEDULES:
        yield elbo_case(f"beta={kind.__name__}", ELBOLoss(beta=schedule(kind)))
    learned = BUILDS["learned prior"]
    yield elbo_of_distributions("balance", ELBOLoss(balance=0.8), *learned)
    yield elbo_of_distributions("a learned prior", ELBOLoss(), *learned)
    yield elbo_of_distributions("a sampled KL", ELBOLoss(MonteCarloKL(8)), *learned)
    for kind, mask in {"weights": WEIGHTS, "bool": WEIGHTS > 0}.items():
        yield masked_elbo(f"a mask: {kind}", mask)
    yield sequences()
    for gradient in get_args(IWAEGradient):
        yield importance(gradient)
    yield decomposition()


def masked_elbo(name: str, mask: Tensor) -> Case:
    def step(recon: Tensor, mean: Tensor, logvar: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return ELBOLoss().from_tensors(recon, x, mean, logvar, "bernoulli_logits", mask=mask).loss

    return Case(f"ELBOLoss: {name}", [*image_tensors("bernoulli_logits"), mask], step, elbo_by_hand, [3, 4])


def sequences() -> Case:
    """The case of sequences of unlike lengths."""
    recon, mean, logvar, x = numbers((N, 4, 5), (N, 4, D), (N, 4, D), (N, 4, 5))
    lengths = torch.tensor([4, 2, 0, 1, 3, 4])

    def step(recon: Tensor, mean: Tensor, logvar: Tensor, x: Tensor, lengths: Tensor) -> Tensor:
        return ELBOLoss().from_tensors(recon, x, mean, logvar, "gaussian", lengths=lengths).loss

    return Case("ELBOLoss: lengths", [recon, mean, logvar, x, lengths], step, elbo_by_hand, [3, 4])


def importance(gradient: IWAEGradient) -> Case:
    """The case of the importance-weighted bound."""
    x, mean, logvar = numbers((N, D), (N, D), (N, D))

    def step(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        def likelihood(z: Tensor) -> Distribution:
            return event(dist.Normal(z, torch.ones_like(z), validate_args=False))

        return IWAELoss(4, gradient=gradient)(likelihood, x, *vae(mean, logvar))

    return Case(f"IWAELoss({gradient})", [x, mean, logvar], step, lambda x, *t: by_hand("vae")(*t), [0], exact=False)


def decomposition() -> Case:
    """The case of the parts of the KL over a data set."""

    def step(mean: Tensor, logvar: Tensor) -> Tensor:
        parts = decompose_kl(*vae(mean, logvar))
        return torch.stack([parts.mutual_information.value, parts.total_correlation.value, parts.kl.value])

    return Case("decompose_kl", BUILDS["vae"][1], step, by_hand("vae"), [0, 1], exact=False, waits=math.inf)
