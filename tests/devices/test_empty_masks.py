"""A mask that drops all of a batch, which an accelerator cannot be asked about: no gradient, and no wait."""

from tests.processes import run

CODE = """
import json, math, torch
import torch.distributions as dist
from torch.distributions import Independent, Normal
from tests.devices.pretended import NAME, pretended
from torch_klloss import AutoKL, ELBOLoss, MonteCarloKL, diagonal_normal, standard_normal_like
from torch_klloss.elbo import IWAELoss

dist.Distribution.set_default_validate_args(False)
positive = torch.nn.functional.softplus
spread = lambda a, b: (Normal(a, positive(b)), Normal(torch.zeros_like(a), 1.0))
PAIRS = {
    "Normal": spread,
    "diagonal_normal": lambda a, b: (q := diagonal_normal(a, b), standard_normal_like(q)),
    "Gamma": lambda a, b: (dist.Gamma(positive(a), positive(b)), dist.Gamma(torch.ones_like(a), 1.0)),
    "Categorical": lambda a, b: (dist.Categorical(logits=a), dist.Categorical(logits=b)),
    "Laplace and Normal": lambda a, b: (dist.Laplace(a, positive(b)), Normal(torch.zeros_like(a), 1.0)),
    "full covariance": lambda a, b: (
        dist.MultivariateNormal(a, scale_tril=torch.diag_embed(positive(b))),
        dist.MultivariateNormal(torch.zeros_like(a), torch.eye(3, device=a.device)),
    ),
}
decoder = lambda z: Independent(Normal(z, torch.ones_like(z)), 1)
STEPS = {name: (lambda a, b, mask, r, build=build: AutoKL(reduction=r)(*build(a, b)[-2:], mask=mask)) for name, build in PAIRS.items()}
for gradient in ("pathwise", "sticking_the_landing"):
    STEPS[f"sampled, {gradient}"] = lambda a, b, mask, r, g=gradient: MonteCarloKL(3, gradient=g, reduction=r)(*spread(a, b), mask=mask)
STEPS["vae from tensors"] = lambda a, b, mask, r: ELBOLoss(reduction=r).from_tensors(a, torch.zeros_like(a), a, b, mask=mask).loss
STEPS["vae, free nats"] = lambda a, b, mask, r: ELBOLoss(reduction=r, free_nats=0.1).from_tensors(a, torch.zeros_like(a), a, b, mask=mask).loss
STEPS["vae"] = lambda a, b, mask, r: ELBOLoss(reduction=r)(decoder(a), torch.zeros_like(a), q := diagonal_normal(a, b), standard_normal_like(q), mask=mask).loss
STEPS["importance"] = lambda a, b, mask, r: IWAELoss(3, reduction=r)(decoder, torch.zeros_like(a), q := diagonal_normal(a, b), standard_normal_like(q), mask=mask)

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
