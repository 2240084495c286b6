"""Images of mixtures, as the mixtures that they are."""

from __future__ import annotations

from torch.distributions import Distribution, MixtureSameFamily, TransformedDistribution

from torch_klloss.distributions.batch_dims import with_batch_dim
from torch_klloss.distributions.transforms import elementwise, is_injective, parts_of


def with_components_outside(d: Distribution) -> Distribution:
    """Return T#(Σ wₖ cₖ), of single numbers, as Σ wₖ T#cₖ; d itself if it is no such image.

    Args:
        d: any distribution. T has to be injective, or the density of an image is not known.

    Examples:
        >>> import torch
        >>> import torch.distributions as dist
        >>> from torch_klloss.distributions.mixtures import with_components_outside
        >>> mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0))
        >>> image = dist.TransformedDistribution(mixture, [dist.ExpTransform()])
        >>> with_components_outside(image).component_distribution
        TransformedDistribution()
    """
    if type(d) is not TransformedDistribution or d.event_shape:
        return d
    base = with_components_outside(d.base_dist)
    if not isinstance(base, MixtureSameFamily) or type(base).log_prob is not MixtureSameFamily.log_prob:
        return d
    components, lifted = base.component_distribution, with_batch_dim(d, 0)
    for t in parts_of(lifted.transforms):
        if elementwise(t) is None or not is_injective(t, components):
            return d
        components = TransformedDistribution(components, [t], validate_args=False)
    return MixtureSameFamily(base.mixture_distribution, components, validate_args=False)
