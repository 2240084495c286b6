"""Flows whose parameters are in networks, as other libraries build them, and the same laws made of tensors."""

import torch
from torch.distributions import Distribution, Independent, Normal, Transform, TransformedDistribution, constraints


class NetworkShift(Transform):
    """y = x exp(s) + t, with s and t from a network that is an attribute, beside the context that it is given."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, network, context, cache_size=0):
        super().__init__(cache_size)
        self.network, self.context = network, context

    def parameters(self):
        return self.network(self.context).chunk(2, -1)

    def _call(self, x):
        log_scale, shift = self.parameters()
        return x * log_scale.exp() + shift

    def _inverse(self, y):
        log_scale, shift = self.parameters()
        return (y - shift) * (-log_scale).exp()

    def log_abs_det_jacobian(self, x, y):
        return self.parameters()[0].sum(-1).expand(x.shape[:-1])


def hidden_shift(network, context, cache_size=0):
    """Return the same transform, whose network and context no attribute leads to."""

    class HiddenShift(NetworkShift):
        def parameters(self):
            return network(context).chunk(2, -1)

    return HiddenShift(None, None, cache_size)


class NetworkNormal(Distribution):
    """A Normal that computes its parameters when they are needed."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, network, context):
        self.network, self.context = network, context
        super().__init__(context.shape[:-1], torch.Size([2]), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return NetworkNormal(self.network, self.context.expand(*batch_shape, -1))

    def rsample(self, sample_shape=()):
        return plain(self.network, self.context).rsample(sample_shape)

    def log_prob(self, value):
        return plain(self.network, self.context).log_prob(value)


def plain(network, context):
    log_scale, shift = network(context).chunk(2, -1)
    return Independent(Normal(shift, log_scale.exp(), validate_args=False), 1)


def _transformed(shift, cache_size=0):
    def build(network, context):
        zeros = torch.zeros(*context.shape[:-1], 2, dtype=context.dtype)
        base = Independent(Normal(zeros, torch.ones_like(zeros)), 1)
        return TransformedDistribution(base, [shift(network, context, cache_size)], validate_args=False)

    return build


FLOWS = {
    "a network of its own": NetworkNormal,
    "a network in a transform": _transformed(NetworkShift),
    "a network behind a transform": _transformed(hidden_shift),
    "a network in a transform with a cache": _transformed(NetworkShift, 1),
    "a network behind a transform with a cache": _transformed(hidden_shift, 1),
}
