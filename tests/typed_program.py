"""A user's program with every public name, which type checkers take at their strictest and which runs."""

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Laplace, MixtureSameFamily, Normal

from torch_klloss import (
    AnalyticKL,
    AutoKL,
    ELBOLoss,
    ELBOTerms,
    KLEstimate,
    KLLoss,
    MonteCarloKL,
    NotCertifiedError,
    QuadratureKL,
    audit,
    audit_module,
    categorical,
    diagonal_normal,
    has_closed_form,
    kl_divergence,
    kl_from_log_probs,
    register_kl,
    standard_normal_like,
)
from torch_klloss.auditing import CATALOGUE, AuditReport, Finding, Mistake, ModuleFinding, ModuleReport
from torch_klloss.callbacks import EstimatorGap, KLAnnealing, KLRoute, PosteriorCollapse
from torch_klloss.distributions import Tail, declare_tails
from torch_klloss.elbo import GECO, IWAELoss, KLDecomposition, PIControl, decompose_kl
from torch_klloss.estimate import NoRouteError
from torch_klloss.language import (
    DistillationLoss,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    LinearHead,
    ReferenceKL,
    ReverseKL,
    SkewKL,
    SparseTeacher,
    VocabShards,
    log_probs_of,
    token_kl,
)
from torch_klloss.losses import Call, Observer
from torch_klloss.methods import (
    ClosedForm,
    Enumeration,
    FirstOf,
    Method,
    MixedGradient,
    MixtureBound,
    MonteCarlo,
    Quadrature,
    RoundedDrawsWarning,
)
from torch_klloss.plots import gap_figure, schedule_figure
from torch_klloss.samplers import IID, Antithetic, Points, Sampler, Sobol, Stratified
from torch_klloss.schedules import Constant, Cosine, Cyclical, Linear, Schedule, Sigmoid
from torch_klloss.testing import KLReport, check_kl


class MyLaplace(Laplace):
    """A family of the user's own."""


def kl_my_laplace(q: MyLaplace, p: MyLaplace) -> Tensor:
    """Return KL(q‖p)."""
    return kl_divergence(Laplace(q.loc, q.scale, validate_args=False), Laplace(p.loc, p.scale, validate_args=False))


class Log:
    """An observer, and a method."""

    def observe(self, call: Call) -> None:
        """Take a call."""
        self.last: Tensor = call.value

    def estimate(self, q: Distribution, p: Distribution, generator: torch.Generator | None = None) -> KLEstimate:
        """Return the KL of a pair."""
        return KLEstimate(kl_divergence(q, p), exact=True, std_error=None, method="mine")


class VAE(pl.LightningModule):
    """A VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.loss = ELBOLoss(beta=Linear(0.0, 1.0, steps=10), free_nats=0.1)

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        """Return the loss."""
        mean, logvar = self.encoder(x).chunk(2, dim=-1)
        q: Independent[Normal] = diagonal_normal(mean, logvar)
        kl: Tensor = AutoKL()(q, standard_normal_like(q))
        terms: ELBOTerms = self.loss(
            Independent(Normal(self.decoder(q.rsample()), 1.0), 1), x, q, standard_normal_like(q), step=batch_idx
        )
        again = self.loss.from_tensors(
            torch.sigmoid(self.decoder(mean)), torch.sigmoid(x), mean, logvar, step=batch_idx
        )
        return terms.loss + again.loss + kl


def likelihood(z: Tensor) -> Distribution:
    """Return p(x|z)."""
    return Independent(Normal(z @ torch.zeros(2, 6), 1.0), 1)


def my_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return the KL of a VAE, by hand."""
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1).mean()


def main() -> None:
    """Use every public name."""
    q, p = Normal(torch.ones(8), 1.0), Normal(torch.zeros(8), 2.0)
    mine: Method = Log()
    samplers: list[Sampler] = [IID(), Antithetic(), Stratified(), Sobol()]
    sampled: list[Method] = [MonteCarlo(8, sampler=sampler) for sampler in samplers]
    methods: list[Method] = [mine, *sampled, ClosedForm(), Quadrature(), FirstOf(Enumeration(), ClosedForm())]
    losses: list[KLLoss] = [
        AnalyticKL(),
        AutoKL([Quadrature()]),
        MonteCarloKL(4, gradient=MixedGradient()),
        QuadratureKL(),
    ]
    values: list[Tensor] = [loss(q, p) for loss in [*losses, *map(KLLoss, methods)]]
    observer: Observer = Log()
    losses[0].add_observer(observer)
    estimate: KLEstimate = losses[0].estimate(q, p)
    points: Points = IID().draw(q, 4, differentiable=False)
    assert has_closed_form(q, p)
    assert estimate.exact
    assert len(values) == 12
    register_kl(MyLaplace, MyLaplace)(kl_my_laplace)  # here, so that an import of this file registers nothing
    declare_tails(MyLaplace, lambda d: (Tail(rate=1.0), Tail(rate=1.0)))
    mixture = MixtureSameFamily(Categorical(torch.ones(8)), q)
    bound = KLLoss(MixtureBound("upper"))(mixture, Normal(0.0, 1.0))
    ratio = kl_from_log_probs(points.weights.log().expand(4, 8), torch.zeros(4, 8))
    x = torch.randn(8, 6)
    posterior = diagonal_normal(torch.zeros(8, 2), torch.zeros(8, 2))
    iwae: Tensor = IWAELoss(4)(likelihood, x, posterior, standard_normal_like(posterior))
    parts: KLDecomposition = decompose_kl(posterior, standard_normal_like(posterior))
    weights: list[Schedule] = [Constant(1.0), Linear(steps=5), Sigmoid(steps=5), Cosine(steps=5), Cyclical(steps=5)]
    controlled = ELBOLoss(beta=GECO(1.0)), ELBOLoss(beta=PIControl(1.0))
    callbacks: list[pl.Callback] = [EstimatorGap(), KLAnnealing(weights[1]), PosteriorCollapse(), KLRoute()]
    pl.Trainer(
        callbacks=callbacks, logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu"
    )
    logits, tokens = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    divergences = ForwardKL(), ReverseKL(), JensenShannon(), Jeffreys(), SkewKL()
    distilled: list[Tensor] = [DistillationLoss(d)(student=logits, teacher=logits) for d in divergences]
    top: SparseTeacher = SparseTeacher(tokens[..., None], logits.log_softmax(-1)[..., :1])
    head, shards = LinearHead(torch.randn(2, 3, 4), torch.randn(5, 4)), VocabShards(logits, 0)
    distilled.append(DistillationLoss()(student=head, teacher=top))
    held: Tensor = ReferenceKL()(policy=logits, reference=logits, tokens=tokens) + token_kl(shards, shards).sum()
    report: AuditReport = audit(my_kl, budget=640)
    found: list[Finding] = list(report.mistakes)
    step: ModuleReport = audit_module(VAE(), x)
    where: list[ModuleFinding] = list(step.findings)
    known: list[Mistake] = list(CATALOGUE)
    laws: KLReport = check_kl(MyLaplace(0.0, 1.0), MyLaplace(1.0, 2.0), num_samples=64)
    figures = gap_figure([1], [2.0], [2.1], [0.1]), schedule_figure(Linear(steps=5))
    errors = NotCertifiedError, NoRouteError, RoundedDrawsWarning
    print(report.ok, laws, found, where, len(known), bound, ratio, iwae, parts, controlled)
    print(held, distilled, figures, errors)
    print(log_probs_of(logits, tokens).shape, categorical(logits).logits.shape)


if __name__ == "__main__":
    main()
