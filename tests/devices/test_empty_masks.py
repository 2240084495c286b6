"""A mask that drops all of a batch, which an accelerator cannot be asked about: no gradient, and no wait."""

from tests.processes import run

CODE = """
import json, math, torch
import torch.distributions as dist
from torch.distributions import Independent, Normal
from tests.devices.pretended import NAME, pretended
from torch_klloss import AutoKL, ELBOLoss, MonteCarloKL, categorical, diagonal_normal, standard_normal_like
from torch_klloss.elbo import IWAELoss

dist.Distribution.set_default_validate_args(False)
spread = lambda a, b: (Normal(a, b), Normal(torch.zeros_like(a), torch.ones_like(a)))
def standard(a, b):
    q = diagonal_normal(a, b)
    return q, standard_normal_like(q)

PAIRS = {
    "Normal": spread,
    "diagonal_normal": standard,
    "Gamma": lambda a, b: (dist.Gamma(a, b), dist.Gamma(torch.ones_like(a), torch.ones_like(a))),
    "Categorical": lambda a, b: (categorical(a), categorical(b)),
    "Laplace and Normal": lambda a, b: (dist.Laplace(a, b), Normal(torch.zeros_like(a), torch.ones_like(a))),
    "full covariance": lambda a, b: (
        dist.MultivariateNormal(a, scale_tril=torch.diag_embed(b)),
        dist.MultivariateNormal(torch.zeros_like(a), torch.eye(3, device=a.device)),
    ),
}
decoder = lambda z: Independent(Normal(z, torch.ones_like(z)), 1)
def closed_form(build):
    return lambda a, b, mask, reduction: AutoKL(reduction=reduction)(*build(a, b), mask=mask)

def sampled(gradient):
    return lambda a, b, mask, reduction: MonteCarloKL(3, gradient=gradient, reduction=reduction)(
        *spread(a, b), mask=mask
    )

def vae(**options):
    return lambda a, b, mask, reduction: ELBOLoss(AutoKL(reduction=reduction), **options).from_tensors(
        a, torch.zeros_like(a), a, b, mask=mask
    ).loss

def of_distributions(a, b, mask, reduction):
    q, p = standard(a, b)
    return ELBOLoss(AutoKL(reduction=reduction))(decoder(a), torch.zeros_like(a), q, p, mask=mask).loss

def importance(a, b, mask, reduction):
    return IWAELoss(3, reduction=reduction)(decoder, torch.zeros_like(a), *standard(a, b), mask=mask)

STEPS = {name: closed_form(build) for name, build in PAIRS.items()}
STEPS |= {f"sampled, {gradient}": sampled(gradient) for gradient in ("pathwise", "sticking_the_landing")}
STEPS |= {"vae from tensors": vae(), "vae, free nats": vae(free_nats=0.1)}
STEPS |= {"vae": of_distributions, "importance": importance}

found = {}
with pretended(float64=True) as counts:
    nothing = torch.zeros(4, dtype=torch.bool, device=NAME)
    for name, step in STEPS.items():
        for reduction in ("sum", "none", "mean"):
            a, b = (torch.full((4, 3), math.nan, device=NAME, requires_grad=True) for _ in range(2))
            counts.clear()
            value = step(a, b, nothing, reduction)
            grads = torch.autograd.grad(value.sum(), [a, b], allow_unused=True)
            waits = dict(counts.waits)
            ends = [value.detach().cpu()] + [g.cpu() for g in grads if g is not None]
            right = value.isnan().cpu().all() if reduction == "mean" else (ends[0] == 0).all()
            zero = all((g == 0).all() for g in ends[1:]) or reduction == "mean"
            if waits or not right or not zero or len(ends) < 2:
                found[f"{name}, {reduction}"] = [waits, str(ends)]
print(json.dumps(found))
"""


def test_the_sum_over_nothing_is_zero_with_no_gradient_and_nobody_waits():
    assert run(CODE) == {}
