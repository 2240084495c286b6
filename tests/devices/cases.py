"""What runs on a device: every closed form, loss, method, sampler and option, each as a step on given tensors.

A new family, value, gradient, sampler, schedule or likelihood is picked up by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import kl_divergence as torch_kl

from tests.closed_forms.test_registered_pairs import PAIRS, Pair
from tests.devices.pairs import BUILDS, WEIGHTS, Case, N, by_hand, drawn, numbers, vae
from tests.devices.token_cases import token_losses
from tests.devices.vae_cases import vaes
from tests.families import FAMILIES
from torch_klloss import (
    AnalyticKL,
    AutoKL,
    KLLoss,
    MonteCarloKL,
    QuadratureKL,
    has_closed_form,
    kl_from_log_probs,
    samplers,
)
from torch_klloss.log_probs import Level, LogProbGradient, LogProbValue
from torch_klloss.methods import Enumeration, MixedGradient, MixtureBound, MonteCarlo, Quadrature
from torch_klloss.methods.mixture_bound import Side as BoundSide
from torch_klloss.methods.monte_carlo.method import Gradient, Value
from torch_klloss.reduction import ReductionName

# Closed forms.


def closed_form(name: str, pair: Pair) -> Case:
    """Return the case of a pair that has one."""
    tensors = pair.parameters((N,), (N,))
    num_q = len(pair.q.spaces)

    def peer(*t: Tensor) -> Tensor:
        q, p = pair.q.build(t[:num_q]), pair.p.build(t[num_q:])
        try:
            return torch_kl(q, p)
        except NotImplementedError:
            return zero(*t)

    fixed = [i for i in range(len(tensors)) if i not in pair.free]
    return Case(name, tensors, pair.kl, peer, fixed, int(name in IF_ALIKE), is_whole=torch_has(pair))


def torch_has(pair: Pair) -> bool:
    """Return whether torch has a closed form of a pair too."""
    try:
        replace(pair, rule=torch_kl).kl(*pair.parameters((N,), (N,)))
    except NotImplementedError:
        return False
    return True


def has_form(pair: Pair) -> bool:
    """Return whether a pair has a closed form."""
    t = pair.parameters((N,), (N,))
    return has_closed_form(pair.q.build(t[: len(pair.q.spaces)]), pair.p.build(t[len(pair.q.spaces) :]))


def zero(*t: Tensor) -> Tensor:
    """Return nothing of note."""
    return torch.stack([part.float().sum() for part in t]).sum() * 0


# Have a closed form if a parameter of both is the same, for which they ask.
IF_ALIKE = ("Kumaraswamy", "Logistic", "LogitRelaxedBernoulli", "NegativeBinomial", "RelaxedBernoulli")
ALIKE = {family.name: pair for family in FAMILIES if has_form(pair := Pair.of(family, family))}
UNLIKE = {name: pair for name, pair in PAIRS.items() if pair.q.family.type is not pair.p.family.type}
HALF = [name for name, pair in (ALIKE | UNLIKE).items() if pair.q.takes("half") and pair.p.takes("half")]


# Losses.


def loss_case(name: str, loss: KLLoss, pair: str, **options: Any) -> Case:
    """Return the case of a loss."""
    build, tensors = BUILDS[pair]
    return Case(f"{name}, {pair}", tensors, lambda loss, *t: loss(*build(*t)), by_hand(pair), module=loss, **options)


def masked_case(name: str, loss: KLLoss, mask: Tensor, exact: bool) -> Case:
    """Return the case of a loss with a mask."""
    tensors = [*BUILDS["vae"][1], mask]

    def peer(mean: Tensor, logvar: Tensor, mask: Tensor) -> Tensor:
        return by_hand("vae")(mean, logvar)

    return Case(name, tensors, lambda *t: loss(*vae(*t[:2]), mask=t[2]), peer, [2], exact=exact)


WAITS = {"trials": 1}  # the number of trials is the number of terms


def losses() -> Iterator[Case]:
    for pair in BUILDS:
        yield loss_case("AutoKL", AutoKL(), pair, exact=False, waits=WAITS.get(pair, 0))
        yield loss_case("MonteCarloKL(8)", MonteCarloKL(8), pair, exact=False)
    yield loss_case("AnalyticKL", AnalyticKL(), "vae")
    for reduction in get_args(ReductionName):
        for kind, mask in {"weights": WEIGHTS, "bool": WEIGHTS > 0}.items():
            for loss in (AutoKL(reduction=reduction), MonteCarloKL(8, reduction=reduction)):
                exact = isinstance(loss, AutoKL)
                yield masked_case(f"{type(loss).__name__}, {reduction}, a mask: {kind}", loss, mask, exact)


# Methods.


def accepted(make: Callable[[], KLLoss]) -> KLLoss | None:
    """Return the loss; None if its options exclude one another."""
    try:
        return make()
    except ValueError:
        return None


def families() -> Iterator[Case]:
    """Every family that torch can draw, sampled."""
    for family in FAMILIES:
        pair, loss = Pair.of(family, family), MonteCarloKL(2)
        if {"sample", "rsample"} & family.defects:
            continue
        tensors, num_q = pair.parameters((N,), (N,)), len(pair.q.spaces)
        build = partial(built, pair, num_q)
        fixed = [i for i in range(len(tensors)) if i not in pair.free]
        yield Case(
            f"{family.name}, sampled",
            tensors,
            lambda loss, *t, build=build: loss(*build(*t)),
            drawn(build),
            fixed,
            exact=False,
            module=loss,
            waits={"InverseGamma": 1, "VonMises": 1}.get(family.name, 0),
        )


def built(pair: Pair, num_q: int, *t: Tensor) -> tuple[Distribution, Distribution]:
    return pair.q.build(t[:num_q]), pair.p.build(t[num_q:])


def sampling() -> Iterator[Case]:
    """Every sampler, value and gradient of MonteCarlo, and parts of draws."""
    for name in samplers.__all__:
        kind = getattr(samplers, name)
        if hasattr(kind, "draw") and not getattr(kind, "_is_protocol", False):
            for pair in ("normals", "gamma", "beta", "mixtures", "squashed"):
                yield loss_case(f"sampler={name}", MonteCarloKL(8, sampler=kind()), pair, exact=False)
    for value in get_args(Value):
        for gradient in get_args(Gradient):
            loss = accepted(partial(MonteCarloKL, 8, value=value, gradient=gradient))
            if loss is not None:
                yield loss_case(f"{value=}, {gradient=}", loss, "learned prior", exact=False)
    remembered = MonteCarloKL(8, gradient=MixedGradient())
    yield loss_case("gradient=MixedGradient()", remembered, "learned prior", exact=False)
    for pair in ("classes", "counts", "trials"):
        for gradient in ("score_function", "none"):
            yield loss_case(f"{gradient=}", MonteCarloKL(8, gradient=gradient), pair, exact=False)
    for num_samples in (1, 70):  # without a spread, and in blocks of private randomness
        yield loss_case(f"MonteCarloKL({num_samples})", MonteCarloKL(num_samples), "student prior", exact=False)
    yield loss_case("chunk_size", MonteCarloKL(8, chunk_size=3), "student prior", exact=False)


def deterministic() -> Iterator[Case]:
    """Quadrature, sums, and bounds of mixtures."""
    for pair in ("laplace prior", "scalar laplace prior", "student prior", "gamma", "mixtures on the line", "squashed"):
        yield loss_case("QuadratureKL", QuadratureKL(rtol=1e-4), pair, waits=math.inf)
    yield loss_case("Quadrature as a fallback", AutoKL([Quadrature(rtol=1e-4), MonteCarlo(8)]), "gamma", waits=math.inf)
    yield loss_case("Enumeration", KLLoss(Enumeration()), "classes")
    yield loss_case("Enumeration", KLLoss(Enumeration()), "trials", waits=1)  # for the number of trials
    for pair in ("counts", "counts against numbers"):
        yield loss_case("Enumeration", KLLoss(Enumeration()), pair, waits=math.inf)
    for side in get_args(BoundSide):
        for pair in ("mixtures", "mixtures on the line"):
            yield loss_case(f"MixtureBound({side!r})", KLLoss(MixtureBound(side, num_iterations=32)), pair, waits=6)


# Log-probabilities at samples.


def log_probs() -> Iterator[Case]:
    log_q, log_p, log_b = numbers((8, N), (8, N), (8, N))
    steps: list[tuple[str, list[Tensor], dict[str, Any]]] = []
    for value in get_args(LogProbValue):
        steps += [
            (f"{value}, {gradient}", [], {"value": value, "gradient": gradient})
            for gradient in get_args(LogProbGradient)
        ]
    for level in get_args(Level):
        steps.append((level, [], {"token_dim": 1, "level": level, "gradient": "score_function"}))
    for name, extra, options in steps:
        yield log_prob_case(name, [log_q, log_p, *extra], options)
    for kind, mask in {"bool": log_p > -0.5, "weights": (log_p > -0.5).double()}.items():
        yield log_prob_case(f"a mask: {kind}", [log_q, log_p, mask], {"gradient": "score_function"}, "mask")
    yield log_prob_case("log_behavior", [log_q, log_p, log_b], {"gradient": "score_function"}, "log_behavior")


def log_prob_case(name: str, tensors: list[Tensor], options: dict[str, Any], third: str = "") -> Case:
    def step(log_q: Tensor, log_p: Tensor, *rest: Tensor) -> Tensor:
        return kl_from_log_probs(log_q, log_p, **options, **({third: rest[0]} if third else {}))

    def peer(log_q: Tensor, log_p: Tensor, *rest: Tensor) -> Tensor:
        return (log_q - log_p).mean()

    return Case(f"kl_from_log_probs: {name}", tensors, step, peer, [2] if third else ())


MAKERS = (losses, families, sampling, deterministic, vaes, log_probs, token_losses)
GROUPS = {make.__name__: {case.name: case for case in make()} for make in MAKERS}
OTHERS = {name: case for group in GROUPS.values() for name, case in group.items()}


def case(name: str) -> Case:
    """Return the case of a name."""
    return OTHERS[name] if name in OTHERS else closed_form(name, (ALIKE | UNLIKE)[name])
