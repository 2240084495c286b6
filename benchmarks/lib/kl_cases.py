"""Cases of benchmarks/closed_forms.py: their peers, their targets, and the check of their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    Gamma,
    LKJCholesky,
    MultivariateNormal,
    Normal,
    Wishart,
)
from torch.distributions import kl_divergence as torch_kl
from torch.nn.functional import kl_div, log_softmax

from tests.references.harness import draw
from tests.references.reference import Params, Reference
from tests.references.targets import GRADIENT, JOINT, MATRIX, SPECIAL, is_same_family
from tests.references.worst_cases import evaluate
from torch_klloss import AutoKL, categorical, diagonal_normal, kl_divergence, standard_normal_like

OURS = "ours"
AUTO = AutoKL()
Loss = Callable[[], Tensor]
KL = Callable[[Distribution, Distribution], Tensor]


@dataclass(frozen=True)
class Case:
    """One comparison of ours with its peers.

    Args:
        name: what the table calls it.
        size: the shape of the batch.
        leaves: the tensors that the gradient goes to.
        losses: scalars of the leaves, by name; "ours" is compared with each of the others.
        targets: by the name of a peer, the largest ratio that ours should have to it.
        disagreements: returns the errors of our values and gradients.
        outlives_step: whether q and p exist already, so that their part of the graph is kept.
    """

    name: str
    size: str
    leaves: Sequence[Tensor]
    losses: dict[str, Loss]
    targets: dict[str, float]
    disagreements: Callable[[], list[str]] = list
    outlives_step: bool = False

    def step(self, name: str) -> None:
        """Take the loss and its gradient, as a training step does."""
        for leaf in self.leaves:
            leaf.grad = None
        self.losses[name]().backward(retain_graph=self.outlives_step)


def vae(size: tuple[int, int], targets: dict[str, float]) -> Case:
    """Return the VAE's own case: from (mean, logvar), q and p built in every step."""
    mean, logvar = torch.randn(size).requires_grad_(), torch.randn(size).requires_grad_()
    losses = {
        OURS: partial(vae_by_us, mean, logvar),
        "torch": partial(vae_by_torch, mean, logvar),
        "one-liner": partial(vae_by_hand, mean, logvar),
    }
    return Case("VAE", _by(size), (mean, logvar), losses, targets, partial(_vae_disagreements, mean, logvar))


def vae_by_us(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the mean KL by the library."""
    q = diagonal_normal(mean, logvar)
    kl: Tensor = AUTO(q, standard_normal_like(q))
    return kl


def vae_by_torch(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the mean KL as torch computes it."""
    q, p = Normal(mean, (0.5 * logvar).exp()), Normal(torch.zeros_like(mean), torch.ones_like(mean))
    return torch_kl(q, p).sum(-1).mean()


def vae_by_hand(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return the mean KL as everybody writes it."""
    return (-0.5 * (1 + logvar - mean**2 - logvar.exp())).sum(-1).mean()


def _vae_disagreements(mean: Tensor, logvar: Tensor) -> list[str]:
    """Check the KL of each example, and the gradient, of rows that fade out towards q = p: allowed are 4 ULP.

    Of an example below 1e-2 nats it is 1e-8 a dimension.
    """
    fading = torch.logspace(0, -8, len(mean)).unsqueeze(-1)
    m, v = ((t.detach() * fading).requires_grad_() for t in (mean, logvar))
    q = diagonal_normal(m, v)
    kl = AutoKL(reduction="none")(q, standard_normal_like(q))
    gradients = torch.autograd.grad(kl.sum(), (m, v))
    wide_m, wide_v = m.detach().double(), v.detach().double()
    truth = 0.5 * (wide_m**2 + wide_v.expm1() - wide_v).sum(-1)
    allowed = torch.where(truth > 1e-2, 4 * _ulp(truth), 1e-8 * m.shape[1])
    wrong = []
    if not ((kl.double() - truth).abs() <= allowed).all():
        wrong.append("VAE: the KL of an example")
    for gradient, expected in zip(gradients, (wide_m, wide_v.expm1() / 2), strict=True):
        if not ((gradient.double() - expected).abs() <= 4 * _ulp(expected)).all():
            wrong.append("VAE: a gradient entry")
    return wrong


def _ulp(truth: Tensor) -> Tensor:
    """Return the distance of neighbouring float32 numbers at float64 numbers."""
    _, exponent = torch.frexp(truth)
    return torch.ldexp(torch.ones_like(truth), exponent.clamp_min(-125) - 24)


def vocabulary(size: tuple[int, int], side: str, targets: dict[str, float]) -> Case:
    """Return the KL between two rows of logits, `size` being (rows, classes), with gradients to q, to p, or to both."""
    q_logits = 2 * torch.randn(size)
    p_logits = q_logits + 0.3 * torch.randn(size)
    leaves = [t.requires_grad_() for t, name in ((q_logits, "q"), (p_logits, "p")) if side in (name, "both")]
    losses = {name: partial(loss, q_logits, p_logits) for name, loss in VOCABULARY.items()}
    check = partial(_vocabulary_disagreements, q_logits[:8], p_logits[:8])
    name = f"Categorical, gradients to {side}"
    return Case(name, _by(size), leaves, losses, targets, check)


def vocabulary_by_us(q_logits: Tensor, p_logits: Tensor) -> Tensor:
    """Return the mean KL by the library."""
    kl: Tensor = AUTO(categorical(q_logits), categorical(p_logits))
    return kl


def vocabulary_by_kl_div(q_logits: Tensor, p_logits: Tensor) -> Tensor:
    """Return the mean KL by torch.nn.functional."""
    log_q, log_p = log_softmax(q_logits, -1), log_softmax(p_logits, -1)
    return kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def vocabulary_by_torch(q_logits: Tensor, p_logits: Tensor) -> Tensor:
    """Return the mean KL by torch.distributions."""
    return torch_kl(Categorical(logits=q_logits), Categorical(logits=p_logits)).mean()


VOCABULARY = {OURS: vocabulary_by_us, "F.kl_div": vocabulary_by_kl_div, "torch": vocabulary_by_torch}


def _vocabulary_disagreements(q_logits: Tensor, p_logits: Tensor) -> list[str]:
    """Check a few rows: the KL to 32 ULP, the gradient to 1e-4 of its largest entry.

    In float64 the plain formula is good to 1e-12 here, where the KL is 0.04.
    """
    q_leaf, p_leaf = (t.detach().clone().requires_grad_() for t in (q_logits, p_logits))
    kl = kl_divergence(categorical(q_leaf), categorical(p_leaf))
    gradients = torch.autograd.grad(kl.sum(), (q_leaf, p_leaf))
    log_q, log_p = (t.detach().double().log_softmax(-1) for t in (q_leaf, p_leaf))
    truth = (log_q.exp() * (log_q - log_p)).sum(-1)
    expected = log_q.exp() * (log_q - log_p - truth.unsqueeze(-1)), log_p.exp() - log_q.exp()
    wrong = [] if ((kl.double() - truth).abs() <= 32 * _ulp(truth)).all() else ["Categorical: a value"]
    for gradient, e in zip(gradients, expected, strict=True):
        if not ((gradient.double() - e).abs().amax(-1) <= GRADIENT[torch.float32] * e.abs().amax(-1)).all():
            wrong.append("Categorical: a gradient entry")
    return wrong


def shared_prior(batch: int, dim: int, targets: dict[str, float]) -> Case:
    """Return a batch of MultivariateNormal against a single one, q and p built in every step."""

    def factors(*shape: int) -> Tensor:
        return (
            torch.randn(*shape, dim, dim).tril(-1) / dim**0.5 + torch.rand(*shape, dim).add(0.5).diag_embed()
        ).requires_grad_()

    leaves = torch.randn(batch, dim).requires_grad_(), factors(batch), torch.randn(dim).requires_grad_(), factors()

    def by(kl: KL) -> Tensor:
        q = MultivariateNormal(leaves[0], scale_tril=leaves[1], validate_args=False)
        return kl(q, MultivariateNormal(leaves[2], scale_tril=leaves[3], validate_args=False)).mean()

    def disagreements() -> list[str]:
        """Compare with torch's formula in float64; far from q = p it is good to far more than float32 has."""
        wide = [leaf.detach().double() for leaf in leaves]
        q, p = (MultivariateNormal(wide[k], scale_tril=wide[k + 1], validate_args=False) for k in (0, 2))
        truth = torch_kl(q, p).mean()
        return [] if (by(kl_divergence) - truth).abs() <= 4 * _ulp(truth) else ["MultivariateNormal, one shared p"]

    losses = {OURS: partial(by, kl_divergence), "torch": partial(by, torch_kl)}
    name = "MultivariateNormal, one shared p"
    return Case(name, f"{batch}, d = {dim}", leaves, losses, targets, disagreements)


def elementwise(reference: Reference, size: tuple[int, int], dtype: torch.dtype, compiled: bool = False) -> Case:
    """Return a same-family pair of moderate parameters.

    In eager mode q and p exist already, so that the KL alone is timed; compiled, they are built in every step, since
    the compiler sees through that.
    """
    drawn = draw(reference, reference.regimes[0], dtype, math.prod(size))
    sides = [{key: _reshaped(t, size) for key, t in side.items()} for side in drawn]
    leaves = [t for side in sides for t in side.values() if t.requires_grad]
    pair = reference.build(*sides)

    def by(kl: KL) -> Loss:
        def built(q_params: Params, p_params: Params) -> Tensor:
            return kl(*reference.build(q_params, p_params)).sum()

        return partial(built, *sides) if compiled else lambda: kl(*pair).sum()

    goal = elementwise_target(reference, compiled)
    return Case(
        f"{reference.name}, {str(dtype).removeprefix('torch.')}",
        _by(size),
        leaves,
        {OURS: by(kl_divergence), "torch": by(torch_kl)},
        {} if goal is None else {"torch": goal},
        partial(_reference_disagreements, reference, dtype),
        outlives_step=not compiled,
    )


def is_elementwise(reference: Reference) -> bool:
    """Return whether the pair is of one family, has no matrices, and exists in torch."""
    if not is_same_family(reference) or issubclass(reference.type_q, (*MATRIX, Wishart, LKJCholesky)):
        return False
    pair = reference.build(*draw(reference, reference.regimes[0], torch.float64, 1))
    try:
        torch_kl(*pair)
    except NotImplementedError:
        return False
    return True


def elementwise_target(reference: Reference, compiled: bool) -> float | None:
    """Return the largest ratio to torch's time that a pair should have; None where none was set."""
    if issubclass(reference.type_q, (Gamma, Beta, Dirichlet)):
        return 5 if compiled else 15
    if issubclass(reference.type_q, (*SPECIAL, *JOINT, *MATRIX)):
        return None
    return 2 if compiled else 3


def one_element() -> Iterator[Case]:
    """Yield pairs of one element, where a loss can only add to what torch takes."""
    for shape in ((), (1,)):
        leaves = [torch.full(shape, x).requires_grad_() for x in (0.5, 2.0)]
        q, p = Normal(*leaves), Normal(torch.zeros(shape), torch.ones(shape))
        losses: dict[str, Loss] = {
            OURS: lambda q=q, p=p: AUTO(q, p),
            "torch": lambda q=q, p=p: torch_kl(q, p).sum(),
        }
        yield Case("AutoKL, Normal", str(list(shape)), leaves, losses, {"torch": 1.1}, outlives_step=True)


def compiled(case: Case) -> Case:
    """Return the case with its losses compiled; only ours have to make a single graph."""
    torch._dynamo.reset()  # what was compiled for another size would make the sizes dynamic
    losses: dict[str, Loss] = {}
    for name, loss in case.losses.items():
        assert isinstance(loss, partial)
        losses[name] = partial(torch.compile(loss.func, fullgraph=name == OURS), *loss.args)
    return replace(case, name=f"{case.name}, compiled", losses=losses)


def _reference_disagreements(reference: Reference, dtype: torch.dtype) -> list[str]:
    drawn = draw(reference, reference.regimes[0], dtype, 4)
    cases = [case for of in ("value", "gradient") for case in evaluate(reference, *drawn, of)]
    return [
        f"{reference.name}, {dtype}: the {case.of}, by {case.used:.2g} of the target" for case in cases if case.used > 1
    ]


def _reshaped(t: Tensor, size: tuple[int, int]) -> Tensor:
    return t.detach().reshape(*size, *t.shape[1:]).clone().requires_grad_(t.requires_grad)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
