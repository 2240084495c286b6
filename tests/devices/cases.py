"""What runs on a device: every closed form, loss, method, sampler and option, each as a step on given tensors.

A new family, value, gradient, sampler, schedule or likelihood is picked up by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, get_args

import torch
import torch.distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from torch.distributions import kl_divergence as torch_kl
from torch.nn import functional

from tests.closed_forms.test_registered_pairs import PAIRS, Pair
from tests.families import FAMILIES
from torch_klloss import (
    AnalyticKL,
    AutoKL,
    ELBOLoss,
    KLLoss,
    MonteCarloKL,
    QuadratureKL,
    diagonal_normal,
    has_closed_form,
    kl_from_log_probs,
    samplers,
    schedules,
    standard_normal_like,
)
from torch_klloss.elbo import GECO, IWAELoss, PIControl, decompose_kl
from torch_klloss.elbo.importance import IWAEGradient
from torch_klloss.elbo.likelihoods import LikelihoodName
from torch_klloss.log_probs import Level, LogProbGradient, LogProbValue
from torch_klloss.methods import Enumeration, MixedGradient, MixtureBound, MonteCarlo, Quadrature
from torch_klloss.methods.mixture_bound import Side as BoundSide
from torch_klloss.methods.monte_carlo.method import Gradient, Value
from torch_klloss.reduction import ReductionName

Step = Callable[..., Tensor]
Build = Callable[..., tuple[Distribution, Distribution]]
N, D, K = 6, 3, 4  # examples, dimensions, classes


@dataclass(frozen=True)
class Case:
    """A step on tensors, whose result is differentiated by those of floating point that are free.

    Attributes:
        name: of the case.
        tensors: on the host, in float64 or bool.
        step: the result, of the tensors.
        peer: what torch has for it, where the host may wait as often.
        fixed: the indices of the tensors that are not differentiated by.
        waits: how often the host may wait beyond that, as a docstring says.
        exact: whether the result is no mean over draws.
        is_whole: whether the peer does all of it, and its kernels can be compared.
        module: a module with a state, of which the step is given a copy on the device.
    """

    name: str
    tensors: Sequence[Tensor] = field(hash=False)
    step: Step
    peer: Step
    fixed: Sequence[int] = field(hash=False, default=())
    waits: float = 0
    exact: bool = True
    is_whole: bool = True
    module: nn.Module | None = None


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


# Pairs for the losses.


def numbers(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Return tensors of numbers in [-1, 1] that are all different."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = 2 * ((0.1 + 0.618033988749895 * torch.arange(sum(sizes), dtype=torch.float64)) % 1) - 1
    return [part.view(shape) for part, shape in zip(raw.split(sizes), shapes, strict=True)]


def normal(loc: Tensor, raw: Tensor) -> dist.Normal:
    return dist.Normal(loc, (raw / 2).exp(), validate_args=False)


def event(d: Distribution) -> Independent:
    return Independent(d, 1, validate_args=False)


def classes(logits: Tensor) -> dist.Categorical:
    return dist.Categorical(logits=logits, validate_args=False)


def mixture(logits: Tensor, components: Distribution) -> dist.MixtureSameFamily:
    return dist.MixtureSameFamily(classes(logits), components, validate_args=False)


def normals(*t: Tensor) -> tuple[Distribution, Distribution]:
    return event(normal(t[0], t[1])), event(normal(t[2], t[3]))


def vae(mean: Tensor, logvar: Tensor) -> tuple[Distribution, Distribution]:
    q = diagonal_normal(mean, logvar)
    return q, standard_normal_like(q)


def scalar_prior(loc: Tensor, raw: Tensor) -> tuple[Distribution, Distribution]:
    return normal(loc, raw), dist.Normal(0.0, 1.0, validate_args=False)


def scalar_laplace_prior(loc: Tensor, raw: Tensor) -> tuple[Distribution, Distribution]:
    return normal(loc, raw), dist.Laplace(0.0, 1.0, validate_args=False)


def learned_prior(mean: Tensor, logvar: Tensor, loc: Tensor, raw: Tensor) -> tuple[Distribution, Distribution]:
    return diagonal_normal(mean, logvar), event(normal(loc, raw))


def laplace_prior(loc: Tensor, raw: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    return normal(loc, raw), dist.Laplace(prior, prior.exp(), validate_args=False)


def student_prior(loc: Tensor, raw: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    return normal(loc, raw), dist.StudentT(4 + prior, prior, prior.exp(), validate_args=False)


def gammas(shape: Tensor, rate: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    q = dist.Gamma(2 + shape, rate.exp(), validate_args=False)
    return q, dist.LogNormal(prior, prior.exp(), validate_args=False)


def betas(a: Tensor, b: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    q = dist.Beta(2 + a, 2 + b, validate_args=False)
    return q, dist.Kumaraswamy(1.5 + prior / 2, 2 + prior, validate_args=False)


def categoricals(logits: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    return classes(logits), classes(prior)


def counts(rate: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    p = dist.NegativeBinomial(5 + prior, (prior / 2).sigmoid(), validate_args=False)
    return dist.Poisson(rate.exp(), validate_args=False), p


def counts_against_numbers(rate: Tensor) -> tuple[Distribution, Distribution]:
    return dist.Poisson(rate.exp(), validate_args=False), dist.NegativeBinomial(4.0, 0.3, validate_args=False)


def trials(logits: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    q = dist.Binomial(torch.full_like(logits, 5).detach(), logits=logits, validate_args=False)
    return q, dist.Poisson(prior.exp(), validate_args=False)


def mixtures(*t: Tensor) -> tuple[Distribution, Distribution]:
    return mixture(t[0], event(normal(t[1], t[2]))), mixture(t[3], event(normal(t[4], t[5])))


def mixtures_on_the_line(*t: Tensor) -> tuple[Distribution, Distribution]:
    return mixture(t[0], normal(t[1], t[2])), mixture(t[3], normal(t[4], t[5]))


def squashed(loc: Tensor, raw: Tensor, prior: Tensor) -> tuple[Distribution, Distribution]:
    transforms = [dist.TanhTransform(), dist.AffineTransform(0.5, 0.5)]
    q = dist.TransformedDistribution(normal(loc, raw / 2), transforms, validate_args=False)
    return q, dist.Beta(1.5 + prior / 2, prior.exp(), validate_args=False)


BUILDS: dict[str, tuple[Build, list[Tensor]]] = {
    "normals": (normals, numbers(*[(N, D)] * 4)),
    "vae": (vae, numbers((N, D), (N, D))),
    "scalar prior": (scalar_prior, numbers((N, D), (N, D))),
    "scalar laplace prior": (scalar_laplace_prior, numbers((N, D), (N, D))),
    "learned prior": (learned_prior, numbers((N, D), (N, D), (D,), (D,))),
    "laplace prior": (laplace_prior, numbers((N, D), (N, D), (D,))),
    "student prior": (student_prior, numbers((N, D), (N, D), (D,))),
    "gamma": (gammas, numbers((N, D), (N, D), (D,))),
    "beta": (betas, numbers((N, D), (N, D), (D,))),
    "classes": (categoricals, numbers((N, K), (K,))),
    "counts": (counts, numbers((N,), (N,))),
    "counts against numbers": (counts_against_numbers, numbers((N,))),
    "trials": (trials, numbers((N, D), (D,))),
    "mixtures": (mixtures, numbers(*[(N, K), (N, K, D), (N, K, D)] * 2)),
    "mixtures on the line": (mixtures_on_the_line, numbers(*[(N, K), (N, K), (N, K)] * 2)),
    "squashed": (squashed, numbers((N, D), (N, D), (D,))),
}


def by_hand(pair: str) -> Step:
    """Return the step that people write: the mean of log q - log p at a draw."""
    return drawn(BUILDS[pair][0])


def drawn(build: Build) -> Step:
    """Return the same step of a pair that a function builds."""

    def step(*t: Tensor) -> Tensor:
        q, p = build(*t)
        x = q.rsample() if q.has_rsample else q.sample()
        return (q.log_prob(x) - p.log_prob(x)).mean()

    return step


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
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.5], dtype=torch.float64)


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


# The loss of a VAE.


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


MAKERS = (losses, families, sampling, deterministic, vaes, log_probs)
GROUPS = {make.__name__: {case.name: case for case in make()} for make in MAKERS}
OTHERS = {name: case for group in GROUPS.values() for name, case in group.items()}


def case(name: str) -> Case:
    """Return the case of a name."""
    return OTHERS[name] if name in OTHERS else closed_form(name, (ALIKE | UNLIKE)[name])
