"""A tensor that is changed in place between the forward and the backward pass: an error, as torch gives, or no effect.

In float64 and with whole parameters, so that no copy stands between what is changed and what is read.
"""

import itertools

import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Geometric,
    Independent,
    Kumaraswamy,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    SigmoidTransform,
    StudentT,
    TanhTransform,
    TransformedDistribution,
    Uniform,
)

from torch_klloss import AnalyticKL, AutoKL, ELBOLoss, KLLoss, kl_from_log_probs
from torch_klloss.elbo import IWAELoss
from torch_klloss.methods import ClosedForm, Enumeration, MixtureBound, MonteCarlo, NotCertifiedError, Quadrature
from torch_klloss.samplers import Sobol


def mixture(probs, loc, scale):
    return MixtureSameFamily(Categorical(probs=probs), Normal(loc, scale))


PAIRS = {
    "student": (
        lambda a, b, df, c, d: (Normal(a, b), StudentT(df, c, d)),
        ([0.5, 0.2], [1.0, 2.0], [4.0, 5.0], [0.1, 0.2], [1.0, 1.5]),
    ),
    "independent": (
        lambda a, b, c, d: (Independent(Normal(a, b), 1), Independent(Laplace(c, d), 1)),
        ([0.5, 0.2], [1.0, 2.0], [0.1, 0.2], [1.0, 1.5]),
    ),
    "mixture": (
        lambda w, a, b, c, d: (mixture(w, a, b), Laplace(c, d)),
        ([0.4, 0.6], [0.5, 2.0], [1.0, 0.5], 0.3, 1.5),
    ),
    "logit_normal": (
        lambda a, b, c, d: (Beta(a, b), TransformedDistribution(Normal(c, d), [SigmoidTransform()])),
        ([0.5, 2.2], [1.0, 2.0], [0.1, 0.2], [1.0, 1.5]),
    ),
    "tanh": (
        lambda a, b, c: (TransformedDistribution(Normal(a, b), [TanhTransform()]), Uniform(-c, c)),
        ([0.5, 2.2], [1.0, 2.0], [1.0, 1.5]),
    ),
    "kumaraswamy": (
        lambda a, b, c, d: (Kumaraswamy(a, b), Kumaraswamy(c, d)),
        ([0.5, 2.2], [1.0, 2.0], [1.1, 0.7], [1.0, 1.5]),
    ),
    "multivariate": (
        lambda a, b, c, d: (MultivariateNormal(a, scale_tril=b), Independent(Laplace(c, d), 1)),
        ([0.5, 2.2], [[1.0, 0.0], [0.5, 2.0]], [0.1, 0.2], [1.0, 1.5]),
    ),
    "counts": (lambda a, b: (Poisson(a), Geometric(probs=b)), ([0.5, 2.2], [0.3, 0.2])),
    "coins": (
        lambda a, b: (Independent(Bernoulli(probs=a), 1), Independent(Bernoulli(probs=b), 1)),
        ([0.5, 0.2], [0.3, 0.2]),
    ),
    "normal": (lambda a, b, c, d: (Normal(a, b), Normal(c, d)), ([0.5, 0.2], [1.0, 2.0], [0.1, 0.2], [1.0, 1.5])),
}
METHODS = {
    "closed_form": ClosedForm(),
    "enumeration": Enumeration(),
    "quadrature": Quadrature(),
    "upper_bound": MixtureBound("upper"),
    **{
        f"{value}, {gradient}, {chunk_size}": MonteCarlo(8, value=value, gradient=gradient, chunk_size=chunk_size)
        for value, gradient in (
            ("log_ratio", "pathwise"),
            ("log_ratio", "sticking_the_landing"),
            ("log_ratio", "score_function"),
            ("log_ratio", "none"),
            ("entropy", "pathwise"),
            ("control_variate", "pathwise"),
            ("taylor", "pathwise"),
            ("k2", "pathwise"),
            ("k3", "sticking_the_landing"),
        )
        for chunk_size in (None, 3)
    },
    "mixed": MonteCarlo(8, gradient="mixed"),
    "sobol": MonteCarlo(8, sampler=Sobol(4), chunk_size=3),
}


def check(loss, values):
    """Change each tensor in turn, where all and where one of them require a gradient, and compare the gradients."""
    numbers = range(len(values))
    raised = 0
    for changed in numbers:
        for learned in ([*numbers], [changed], [(changed + 1) % len(values)]):
            kept, found = (_gradients(loss, values, learned, change) for change in (None, changed))
            if kept is None:
                continue
            raised += found is None
            for one, other in zip(kept, found or kept, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)
    return raised


def _gradients(loss, values, learned, changed):
    """Return the gradients; None where backward raised, or there are none."""
    torch.manual_seed(0)
    tensors = [torch.tensor(v, dtype=torch.float64).requires_grad_(i in learned) for i, v in enumerate(values)]
    value = loss(*tensors)
    if not value.requires_grad:
        return None
    if changed is not None:
        with torch.no_grad():
            tensors[changed].mul_(0.9)
    try:
        return torch.autograd.grad(value, [tensors[i] for i in learned], allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        return None


QUICK = {
    *zip(itertools.cycle(("student", "independent")), METHODS, strict=False),
    ("mixture", "upper_bound"),
    ("mixture", "log_ratio, score_function, 3"),
    ("coins", "enumeration"),
    ("normal", "closed_form"),
    ("student", "quadrature"),
    ("tanh", "log_ratio, pathwise, 3"),
}
ALL = [  # the rest of the product is a longer sweep
    pytest.param(*each, marks=[] if each in QUICK else pytest.mark.exhaustive)
    for each in itertools.product(PAIRS, METHODS)
]


@pytest.mark.parametrize(("pair", "method"), ALL)
def test_a_parameter_changed_before_backward_is_noticed_or_has_no_effect(pair, method):
    make, values = PAIRS[pair]
    try:
        METHODS[method].estimate(*make(*(torch.tensor(v, dtype=torch.float64) for v in values)))
    except (NotImplementedError, NotCertifiedError):
        pytest.skip("refused")
    check(lambda *tensors: METHODS[method].estimate(*make(*tensors)).value.sum(), values)


MEAN, LOGVAR = [[0.5, 0.2], [0.1, 1.0]], [[0.1, 0.2], [0.3, 0.4]]
RECON, X = [[0.5, 0.2, 0.1]] * 2, [[0.5, 0.2, 0.9]] * 2
LOG_PROBS = [[-1.0, -2.0], [-0.5, -0.7]]


def iwae(mean, scale, decoder, x):
    return IWAELoss(4)(
        lambda z: Independent(Normal(z @ decoder, 1.0), 1),
        x,
        Independent(Normal(mean, scale), 1),
        Independent(Normal(torch.zeros_like(mean), 1.0), 1),
    )


def elbo(**settings):
    loss = ELBOLoss(**settings)

    def of(recon, x, mean, scale):
        q, p = (Independent(d, 1) for d in (Normal(mean, scale), Normal(torch.zeros_like(mean), 1.0)))
        return loss(Independent(Normal(recon, 1.0), 1), x, q, p).loss

    return of


def balanced(recon, x, mean, scale, prior_scale):
    if not prior_scale.requires_grad:  # refused: there is nothing to balance
        return recon.sum().detach()
    q, p = (Independent(d, 1) for d in (Normal(mean, scale), Normal(torch.zeros_like(mean), prior_scale)))
    return ELBOLoss(balance=0.8)(Independent(Normal(recon, 1.0), 1), x, q, p).loss


LOSSES = {
    **{
        f"fused {name}": (
            lambda *tensors, name=name: ELBOLoss(beta=0.5).from_tensors(*tensors, name).loss,
            (RECON, X, MEAN, LOGVAR),
        )
        for name in ("bernoulli", "bernoulli_logits", "gaussian")
    },
    "fused in float32": (
        lambda *tensors: ELBOLoss().from_tensors(*(t.float() for t in tensors), "gaussian").loss,
        (RECON, X, MEAN, LOGVAR),
    ),
    "free nats": (
        lambda *tensors: ELBOLoss(free_nats=0.1).from_tensors(*tensors, "gaussian").loss,
        (RECON, X, MEAN, LOGVAR),
    ),
    "elbo": (elbo(), (RECON, X, MEAN, LOGVAR)),
    "elbo sampled": (elbo(kl=KLLoss(MonteCarlo(8, chunk_size=3))), (RECON, X, MEAN, LOGVAR)),
    "elbo balanced": (balanced, (RECON, X, MEAN, LOGVAR, LOGVAR)),
    "iwae": (iwae, (MEAN, LOGVAR, [[0.2, 0.3, 0.1], [0.4, 0.5, 0.6]], X)),
    "analytic": (lambda a, b, c: AnalyticKL()(Normal(a, b), Normal(c, 1.0)), (MEAN, LOGVAR, LOGVAR)),
    "auto": (lambda a, b, c: AutoKL()(Normal(a, b), StudentT(4.0, c)), (MEAN, LOGVAR, LOGVAR)),
    "log_probs": (lambda a, b: kl_from_log_probs(a, b, gradient="score_function").sum(), (LOG_PROBS, LOG_PROBS)),
    "log_probs k3": (
        lambda a, b: kl_from_log_probs(a, b, value="k3", gradient="pathwise").sum(),
        (LOG_PROBS, LOG_PROBS[::-1]),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_notices_a_tensor_changed_before_backward(name):
    check(*LOSSES[name])


@pytest.mark.parametrize(
    "method",
    [Quadrature(), MonteCarlo(8, chunk_size=3), MonteCarlo(8, chunk_size=3, value="control_variate")],
    ids=repr,
)
def test_what_is_computed_again_in_backward_raises_for_a_constant_too(method):
    make, values = PAIRS["student"]
    assert check(lambda *tensors: method.estimate(*make(*tensors)).value.sum(), values) >= 10


def test_a_frozen_network_in_p_is_among_what_was_read():
    class Energy(torch.distributions.Distribution):
        arg_constraints, support = {}, torch.distributions.constraints.real

        def __init__(self, net):
            self.net = net
            super().__init__(validate_args=False)

        def log_prob(self, x):
            return -(self.net(x.unsqueeze(-1)).squeeze(-1) ** 2)

    net = torch.nn.Linear(1, 1).requires_grad_(False)
    loc = torch.tensor(0.5, requires_grad=True)
    value = MonteCarlo(8, chunk_size=3).estimate(Normal(loc, 1.0), Energy(net)).value
    with torch.no_grad():
        net.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
