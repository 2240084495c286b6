"""The parts of a VAE's KL over a data set: mutual information, total correlation, dimension-wise KL."""

from __future__ import annotations

import math
from contextlib import nullcontext
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.checks import check_pair, type_name
from torch_klloss.distributions.densities import log_density, log_density_within
from torch_klloss.distributions.located import Located
from torch_klloss.distributions.precision import pair_in_full_precision
from torch_klloss.distributions.simplify import peel
from torch_klloss.distributions.tensors import device_of, unvalidated
from torch_klloss.estimate import KLEstimate
from torch_klloss.rng import draw_seed, private_rng
from torch_klloss.samplers import IID, Points
from torch_klloss.samplers.origins import prepare_located


class KLDecomposition(NamedTuple):
    """The parts of the mean KL over a data set, in nats, each an estimate with its standard error.

    With q(z) = 1/N Σ_n q(z|x_n), the aggregate posterior:

    Attributes:
        mutual_information: I(x; z) = 1/N Σ_n KL(q(z|x_n)‖q(z)), between 0 and log N: what z knows of x.
        total_correlation: KL(q(z)‖Π_j q(z_j)): how far the latent dimensions depend on one another.
        dimension_wise: Σ_j KL(q(z_j)‖p(z_j)): how far each of them is from the prior.
        dimension_wise_each: the same of every dimension, `[latent]`.
        kl: their sum, 1/N Σ_n KL(q(z|x_n)‖p(z)).
    """

    mutual_information: KLEstimate
    total_correlation: KLEstimate
    dimension_wise: KLEstimate
    dimension_wise_each: KLEstimate
    kl: KLEstimate


@torch.no_grad()
def decompose_kl(
    q: Distribution,
    p: Distribution,
    *,
    num_samples: int = 4,
    chunk_size: int = 2**22,
    generator: torch.Generator | None = None,
) -> KLDecomposition:
    """Decompose the mean KL over a data set into mutual information, total correlation and dimension-wise KL.

    The densities of the aggregate posterior are exact: the mixture over **all** examples given, without the bias of
    minibatch weighting. Only z is sampled, equally often from every q(z|x_n); the error is determined from the spread
    of the `num_samples` independent sweeps over the data. For analysis: no gradient is recorded.

    Args:
        q: the posteriors of the whole data set: batch shape `[N]` and event shape `[latent]`, of independent
            dimensions.
        p: the prior, of independent dimensions too; its batch shape is () or broadcasts to `[N]`.
        num_samples: how many z are drawn for each example; from two on there is a standard error.
        chunk_size: how many densities (points × examples × dimensions) are in memory at a time.
        generator: where the samples come from; the global stream by default.

    Raises:
        ValueError: if shapes do not fit, or a setting is below 1.
        NotImplementedError: if the dimensions of q or of p depend on one another.

    References:
        *Isolating sources of disentanglement in variational autoencoders* (Chen et al., 2018). *ELBO surgery* (Hoffman
        and Johnson, 2016).

    Examples:
        >>> import torch
        >>> from torch_klloss import diagonal_normal, standard_normal_like
        >>> from torch_klloss.elbo import decompose_kl
        >>> mean = torch.tensor([[-30.0, 0.0], [30.0, 0.0]])  # two examples, distinct in the first dimension alone
        >>> q = diagonal_normal(mean, torch.zeros(2, 2))
        >>> parts = decompose_kl(q, standard_normal_like(q))
        >>> parts.mutual_information.value  # log 2
        tensor(0.6931)
        >>> bool(parts.total_correlation.value.abs() < 1e-5)  # no dependence
        True
    """
    q, p = pair_in_full_precision(q, p)
    base_q, base_p = _factorised(q, p, num_samples, chunk_size)
    base_q = unvalidated(base_q)
    with nullcontext() if generator is None else private_rng(draw_seed(generator, device_of(q)), device_of(q)):
        draws = prepare_located(IID(), base_q, num_samples, differentiable=False)
    _, z = draws.part(0, num_samples)  # [num_samples, N, latent]
    log_conditional = log_density_within(base_q, z, z.x.shape)
    log_prior = log_density(base_p, z, None)
    log_aggregate, log_marginals = _aggregate(base_q, z, chunk_size)
    sweeps = {
        "mutual_information": log_conditional.sum(-1) - log_aggregate,
        "total_correlation": log_aggregate - log_marginals.sum(-1),
        "dimension_wise": (log_marginals - log_prior).sum(-1),
        "dimension_wise_each": log_marginals - log_prior,
        "kl": (log_conditional - log_prior).sum(-1),
    }
    return KLDecomposition(**{key: _estimate(terms) for key, terms in sweeps.items()})


def _factorised(
    q: Distribution, p: Distribution, num_samples: int, chunk_size: int
) -> tuple[Distribution, Distribution]:
    """Return q and p over their single dimensions, `[N, latent]`."""
    if num_samples < 1 or chunk_size < 1:
        raise ValueError(f"num_samples and chunk_size must be at least 1, got {num_samples} and {chunk_size}.")
    check_pair(q, p)
    if len(q.batch_shape) != 1 or len(q.event_shape) != 1 or q.batch_shape[0] == 0:
        raise ValueError(
            f"q must hold the posteriors of a data set, with batch shape [N] and event shape [latent], got "
            f"{tuple(q.batch_shape)} and {tuple(q.event_shape)}: diagonal_normal(mean, logvar) of all examples."
        )
    base_q, base_p, _ = peel(q, p)
    if base_q.event_shape:
        raise NotImplementedError(
            f"decompose_kl needs q and p of independent dimensions, Independent(…, 1), got {type_name(q)} and "
            f"{type_name(p)}."
        )
    return base_q, base_p


def _aggregate(q: Distribution, z: Located, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Return log q(z) `[*points]` and log q(z_j) `[*points, latent]` of the mixture over all examples."""
    num_examples, latent = q.batch_shape
    shape, points = z.x.shape, z.map(lambda t: t.flatten(0, 1).unsqueeze(1))  # [points, 1, latent]
    size = max(1, chunk_size // (num_examples * latent))
    log_joint, log_each = [], []
    for rows in torch.arange(len(points.x), device=points.x.device).split(size):
        at_examples = log_density_within(q, points.map(itemgetter(rows)))  # [points, N, latent]
        log_joint.append(at_examples.sum(-1).logsumexp(1))
        log_each.append(at_examples.logsumexp(1))
    shift = math.log(num_examples)
    return (torch.cat(log_joint) - shift).view(shape[:2]), (torch.cat(log_each) - shift).view(shape)


def _estimate(terms: Tensor) -> KLEstimate:
    """Return the mean over sweeps and examples, `[num_samples, N, …]`, with its error from the spread of the sweeps."""
    sweeps = terms.mean(1)
    num_samples = len(sweeps)
    points = Points(sweeps, sweeps.new_full((), 1 / num_samples), num_samples)
    return KLEstimate(
        sweeps.mean(0),
        exact=False,
        std_error=points.std_error(sweeps),
        dof=num_samples - 1,
        method="monte_carlo",
        num_evaluations=terms.shape[0] * terms.shape[1],
        skewness=points.skewness(sweeps),
    )
