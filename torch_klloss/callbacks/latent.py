"""Statistics of a posterior: KL and mean of every latent unit, and mutual information."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.distributions.simplify import simplify
from torch_klloss.methods import ClosedForm, Enumeration, FirstOf, MonteCarlo
from torch_klloss.numerics.dimensions import sum_after

_METHOD = FirstOf(ClosedForm(), Enumeration(), MonteCarlo(16))


def kl_per_unit(q: Distribution, p: Distribution, num_examples_dims: int) -> Tensor:
    """Return the KL of every latent unit, `[*examples, units]`, in nats.

    The units are the dimensions that q and p both factorise over: the 8 of an `Independent` Normal against another
    one. A pair that does not factorise, such as a Normal against a mixture prior, is one unit.
    """
    q, p, _ = simplify(q, p)
    return _as_units(_METHOD.estimate(q, p).value, num_examples_dims)


def posterior_means(q: Distribution, num_examples_dims: int) -> Tensor | None:
    """Return E[z|x], `[*examples, units]`; None if q has no mean (Categorical, Cauchy)."""
    try:
        mean = q.mean
    except NotImplementedError:
        return None
    return None if mean.isnan().all() else _as_units(mean, num_examples_dims)


def mutual_information(q: Distribution, keep: Tensor, num_draws: int) -> Tensor:
    """Estimate I(x; z) of the examples: log q(z|x) - log mean_x' q(z|x') at one draw of up to `num_draws` examples.

    x is one of the n examples kept, each as likely as the others. Every value is at most log n. Their mean is
    unbiased for these n, and in expectation below the mutual information of the data that they were drawn from.

    Args:
        q: the posterior, `[*examples, *latent]` + event.
        keep: bool, `[*examples]`.
        num_draws: for how many examples, spread evenly over the batch, the ratio is computed.

    Returns:
        `[min(n, num_draws)]`, in nats.

    References:
        *ELBO surgery: yet another way to carve up the variational evidence lower bound* (Hoffman and Johnson, 2016).
        *On variational bounds of mutual information* (Poole et al., 2019).

    Examples:
        >>> import torch
        >>> from torch.distributions import Normal
        >>> from torch_klloss.callbacks.latent import mutual_information
        >>> apart = Normal(torch.tensor([0.0, 100.0]), 1.0)  # z determines the example
        >>> mutual_information(apart, torch.tensor([True, True]), num_draws=2)
        tensor([0.6931, 0.6931])
    """
    dims = keep.dim()
    rows = keep.flatten().nonzero().squeeze(-1)
    spread = torch.linspace(0, len(rows) - 1, min(len(rows), num_draws), device=rows.device)
    picked = rows[spread.round().long()]
    z = q.sample().flatten(0, dims - 1)[picked]
    z = z.reshape(z.shape[:1] + (1,) * dims + z.shape[1:]).expand(z.shape[:1] + keep.shape + z.shape[1:])
    log_q = sum_after(q.log_prob(z), 1 + dims).flatten(1)
    own = log_q.gather(1, picked.unsqueeze(1)).squeeze(1)
    return own - log_q[:, rows].logsumexp(1) + math.log(max(1, len(rows)))


def _as_units(values: Tensor, num_examples_dims: int) -> Tensor:
    """Return `[*examples, units]`, with one unit if there is no further dimension."""
    return values.flatten(num_examples_dims) if values.dim() > num_examples_dims else values.unsqueeze(-1)
