"""The gradient of an integral whose value and nodes are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_klloss.distributions.supports import has_moving_support
from torch_klloss.distributions.tensors import tensors_of
from torch_klloss.methods.quadrature.certificate import Certificate, plain_integrals
from torch_klloss.methods.quadrature.coordinates import Coordinate
from torch_klloss.methods.quadrature.integrand import Integrand
from torch_klloss.methods.quadrature.remainder import tail_integrals
from torch_klloss.methods.quadrature.rules import weigh
from torch_klloss.methods.quadrature.state import State
from torch_klloss.numerics.exponentials import e2, expm1
from torch_klloss.numerics.versions import Versions


def with_gradient(f: Integrand, certificates: Sequence[Certificate], value: Tensor) -> Tensor:
    """Return the flat KL, connected to the parameters; where it is infinite or NaN its derivative is 0."""
    if not f.is_flat:
        (certificate,) = certificates
        return torch.where(certificate.is_settled, certificate.value, value_of(f, certificate)).flatten()
    leaves: list[tuple[Tensor, Tensor]] = []
    f.select(torch.zeros(0, dtype=torch.long, device=value.device), leaves)
    if not leaves:
        return value
    return _LazyGradient.apply(value, f, list(_without_settled(certificates)), *(t for t, _ in leaves))


def _without_settled(certificates: Sequence[Certificate]) -> Iterator[Certificate]:
    """Yield the certificates without the elements whose value is infinite or NaN."""
    for certificate in certificates:
        index = (~certificate.is_settled).nonzero()[:, 0]
        if len(index) == len(certificate.is_settled):
            yield certificate
        elif len(index):
            yield certificate.select(index)


def value_of(f: Integrand, certificate: Certificate) -> Tensor:
    """Return the KL `[*batch]` in the form that was chosen, connected to the parameters.

    The nodes are held fixed in v, so that they move with the ends of the support and with nothing else.
    """
    state, is_near = certificate.state, certificate.is_near
    coordinate = state.placement.coordinate(f)
    v, weights = _nodes(f, coordinate, state)
    _, mass, log_ratio = weigh(f, coordinate, v, weights)
    plain, total_mass = (mass * (log_ratio - 1)).sum(0), mass.sum(0)
    tails = tail_integrals(f, coordinate, state.ends, state.is_open)[0] if state.is_open.any() else None
    if tails is not None:
        plain, total_mass = plain + tails[0], total_mass + tails[2]
    value = f.total(plain_integrals(plain, total_mass, f.known_mass()))
    if is_near.any():
        near = (mass * e2(-log_ratio.clamp(-2, 2))).sum(0)
        near = f.total(near if tails is None else near + tails[1])
        if has_moving_support(f.q) or has_moving_support(f.p):
            # The near form assumes that p's mass over the nodes is 1, but this mass moves with them.
            near = near.detach() + value - value.detach()
        value = torch.where(is_near, near, value)
    return value


def _outputs_and_grads(
    f: Integrand, certificate: Certificate, grad: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return tensors that depend on the parameters, and the derivatives of the value with respect to these.

    Where the nodes are fixed and their values are kept, these are the log-densities alone.
    """
    state = certificate.state
    moves = has_moving_support(f.q) or has_moving_support(f.p) or bool(state.is_open.any())
    if moves or state.values is None or bool(state.sums.has_empty_node.any()):
        return (value_of(f, certificate),), (grad,)
    x, mass, log_ratio = state.values
    c = (mass * log_ratio).sum(0) / mass.sum(0)
    by_mass, by_ratio = mass * (log_ratio - 1 - c), mass
    is_near = f.per_integral(certificate.is_near).expand(f.shape)
    if is_near.any():
        by_mass = torch.where(is_near, mass * e2(-log_ratio), by_mass)
        by_ratio = torch.where(is_near, -mass * expm1(-log_ratio), by_ratio)
    grad = f.per_integral(grad)
    outputs, grads = f.densities(x), (grad * by_mass, grad * by_ratio)
    known = f.known_mass()
    if isinstance(known, Tensor):
        return (*outputs, known), (*grads, torch.where(is_near, 0.0, grad * (1 + c)))
    return outputs, grads


@torch.no_grad()
def _nodes(f: Integrand, coordinate: Coordinate, state: State) -> tuple[Tensor, Tensor]:
    """Return nodes and weights, with nodes of no mass moved to the fullest: a weight of 0 keeps a NaN derivative."""
    v, weights = state.rule.nodes()
    if not state.sums.has_empty_node.any():
        return v, weights
    mass = weigh(f, coordinate, v, weights).mass
    fullest = v.gather(0, mass.argmax(0, keepdim=True))
    return torch.where(mass == 0, fullest, v), torch.where(mass == 0, 0.0, weights)


class _LazyGradient(torch.autograd.Function):
    """A known value, whose derivative is computed when it is asked for, certificate by certificate."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, f: Integrand, certificates: list[Certificate], *tensors: Tensor) -> Tensor:
        """Return the value; the tensors of f that need a gradient follow in the order of `Integrand.select`."""
        ctx.f, ctx.certificates = f, certificates
        ctx.versions = Versions((*tensors_of(f.q), *tensors_of(f.p)))
        ctx.save_for_backward(*tensors)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivatives with respect to the tensors."""
        ctx.versions.check()
        (grad,) = grads
        indices = [certificate.state.index for certificate in ctx.certificates]
        if torch.is_grad_enabled():  # the derivative is to be differentiated again
            parts = [value_of(ctx.f.select(index), c) for index, c in zip(indices, ctx.certificates, strict=True)]
            grads = tuple(grad[index] for index in indices)
            found = torch.autograd.grad(parts, ctx.saved_tensors, grads, create_graph=True, allow_unused=True)
            return None, None, None, *found
        totals = [torch.zeros_like(t) for t in ctx.saved_tensors]
        for index, certificate in zip(indices, ctx.certificates, strict=True):
            leaves: list[tuple[Tensor, Tensor]] = []
            part = ctx.f.select(index, leaves)
            with torch.enable_grad():
                pairs = zip(*_outputs_and_grads(part, certificate, grad[index]), strict=True)
            outputs, weights = zip(*((o, w) for o, w in pairs if o.requires_grad), strict=True)  # p may have no leaf
            found = torch.autograd.grad(outputs, [leaf for _, leaf in leaves], weights, allow_unused=True)
            for total, each in zip(totals, found, strict=True):
                if each is not None:
                    total[index] = each
        return None, None, None, *totals
