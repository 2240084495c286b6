"""Devices: every tensor is created on q's device, here "meta", which has no values and needs no hardware."""

import pytest
import torch
import torch.distributions as dist
from torch.distributions import Independent, Normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_klloss import AutoKL, MonteCarloKL, categorical, diagonal_normal, kl_divergence, standard_normal_like
from torch_klloss.methods import ClosedForm, Enumeration, FirstOf, MonteCarlo

# torch's argument checks need values, which meta tensors lack.
pytestmark = pytest.mark.usefixtures("unvalidated")


class OnMeta(TorchDispatchMode):
    """Fail where an operation returns a tensor on another device; scalars are allowed, as they cost no transfer."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._sample_dirichlet.default:  # torch has none for meta tensors
            return torch.empty_like(args[0])
        out = func(*args, **(kwargs or {}))
        strays = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t.is_meta and t.dim() > 0]
        assert not strays, f"{func} returned a tensor of shape {tuple(strays[0].shape)} on {strays[0].device}"
        return out


def meta(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="meta")


def normal(*shape: int) -> Normal:
    return Normal(meta(*shape), meta(*shape))


PAIRS = {
    "normal": lambda: (normal(4, 3), normal(3)),
    "vae": lambda: (q := diagonal_normal(meta(4, 3), meta(4, 3)), standard_normal_like(q)),
    "scalar_prior": lambda: (normal(4, 3), Normal(0.0, 1.0)),
    "student_t": lambda: (normal(4, 3), dist.StudentT(meta(3))),
    "gamma": lambda: (dist.Gamma(meta(4, 3), meta(3)), dist.Gamma(meta(3), meta(3))),
    "beta": lambda: (dist.Beta(meta(4, 3), meta(3)), dist.Uniform(meta(3), meta(3))),
    "laplace": lambda: (dist.Laplace(meta(4, 3), meta(3)), dist.Laplace(meta(3), meta(3))),
    "uniform": lambda: (dist.Uniform(meta(4, 3), meta(3)), dist.Uniform(meta(3), meta(3))),
    "dirichlet": lambda: (dist.Dirichlet(meta(4, 3)), dist.Dirichlet(meta(3))),
    "gumbel": lambda: (dist.Gumbel(meta(4), meta(4)), dist.Gumbel(meta(4), meta(4))),
    "bernoulli": lambda: (dist.Bernoulli(logits=meta(4, 3)), dist.Bernoulli(logits=meta(3))),
    "categorical": lambda: (categorical(meta(4, 3)), dist.Categorical(logits=meta(4, 3))),
    "cross": lambda: (dist.Bernoulli(logits=meta(4)), dist.Poisson(meta(4))),
    "lognormal": lambda: (dist.LogNormal(meta(4), meta(4)), dist.LogNormal(meta(4), meta(4))),
    "unlike_support": lambda: (normal(4), dist.Exponential(meta(4))),
}
METHODS = {"closed": ClosedForm(), "enumeration": Enumeration(), "sampled": MonteCarlo(5)} | {
    gradient: MonteCarlo(5, gradient=gradient) for gradient in ("score_function", "sticking_the_landing")
}


@pytest.mark.parametrize("build", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_stays_on_the_device_of_q(build, method):
    q, p = build()
    with OnMeta():
        if not FirstOf(method).supports(q, p):
            return
        estimate = method.estimate(q, p)
        assert estimate.value.is_meta
        assert estimate.value.shape == torch.broadcast_shapes(q.batch_shape, p.batch_shape)
        assert estimate.std_error is None or estimate.std_error.is_meta


def reductions():
    """Return the reductions with and without a mask; each of them once in every run."""
    for reduction in ("mean", "sum", "none"):
        for masked in (False, True):
            marks = () if masked == (reduction == "mean") else pytest.mark.exhaustive
            yield pytest.param(reduction, masked, id=f"{reduction}-{masked}", marks=marks)


@pytest.mark.parametrize("build", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize(("reduction", "masked"), list(reductions()))
def test_every_loss_stays_on_the_device_of_q(build, reduction, masked):
    q, p = build()
    with OnMeta():
        mask = meta(4) if masked else None
        for loss in (AutoKL(reduction=reduction), MonteCarloKL(3, reduction=reduction)):
            assert loss(q, p, mask=mask, generator=torch.Generator()).is_meta
            assert loss.reduce(loss.estimate(q, p), mask).value.is_meta


def test_the_constructors_stay_on_the_device_of_their_parameters():
    with OnMeta():
        q = diagonal_normal(meta(4, 3), meta(4, 3))
        for d in (q, standard_normal_like(q), standard_normal_like(dist.Gumbel(meta(4), meta(4)))):
            assert d.mean.is_meta
        assert categorical(meta(4, 3)).logits.is_meta
        assert kl_divergence(q, Independent(normal(4, 3), 1)).is_meta


def test_a_tensor_on_another_device_would_be_noticed():
    q, p = (normal(4) for _ in range(2))

    class OnTheHost(MonteCarlo):
        """The usual mistake: samples on the default device instead of q's."""

        def estimate(self, q, p, generator=None):
            torch.full((self.num_samples,), 1 / self.num_samples)
            return super().estimate(q, p, generator)

    with OnMeta(), pytest.raises(AssertionError, match=r"returned a tensor of shape \(5,\) on cpu"):
        OnTheHost(5).estimate(q, p)
