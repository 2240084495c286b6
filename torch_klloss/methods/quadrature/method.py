"""The KL of a one-dimensional pair, by a quadrature that certifies its error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily

from torch_klloss.distributions.checks import check_common_measure, type_name
from torch_klloss.distributions.simplify import simplify
from torch_klloss.distributions.supports import bounds_of, contained, is_discrete
from torch_klloss.distributions.tensors import device_of, dtype_of
from torch_klloss.estimate import KLEstimate, NotCertifiedError
from torch_klloss.methods.base import BaseMethod
from torch_klloss.methods.enumeration.method import Enumeration
from torch_klloss.methods.quadrature.certificate import refusal
from torch_klloss.methods.quadrature.gradient import Outcome, with_gradient
from torch_klloss.methods.quadrature.integrand import Integrand, integrand
from torch_klloss.methods.quadrature.solver import solve
from torch_klloss.numerics.tracing import is_traced

_SUM = Enumeration()
_CHUNK = 2**17  # elements times nodes that are worked on at a time: 1 MB a tensor, which the caches hold


@dataclass(frozen=True)
class Quadrature(BaseMethod):
    """Compute KL(q‖p) = ∫ q (log q - log p) dx of a one-dimensional pair, to an error that is checked.

    Deterministic, for every q and p with a `log_prob` and a support that is an interval, a half line, the line or the
    circle; what is one-dimensional after `Independent` and shared transforms are taken off is summed back. A mixture
    q is integrated component by component; a discrete q is summed by `Enumeration`. Neither `sample` nor `icdf` is
    needed: the nodes are placed by what q says of its mean and spread, and by a scan of the densities from one end of
    float64 to the other. Where both are smooth a trapezoidal rule of `num_nodes` does; otherwise Gauss-Legendre panels
    are split at kinks and halved until the error is below the tolerance, at up to forty times as many nodes.

    The value is right to `rtol`, or there is none: an element whose error cannot be brought below `rtol`, or cannot be
    told, is refused with a `NotCertifiedError`, and the whole batch with it. `KLEstimate.error_bound` is the checked
    estimate of the error: from how fast the integrand's expansion converges, whether q adds up to 1 over the nodes,
    and how well what lies beyond them is known. No set of points can vouch against a spike between them. An infinite
    KL is told by the supports, by declared tails (`torch_klloss.distributions.declare_tails`) and, for families
    without, by the slope of the integrand at distances of 1e±100.

    The gradient is that of the sum, whose nodes move with the ends of q's support and with nothing else. It is as
    accurate as the value, for the parameters of q and of p alike, also where the support of q depends on them. Near
    q = p the sum has terms ≥ 0 only and keeps its digits. A float32 pair is computed in float64.

    A distribution of your own whose log-density has kinks or jumps declares them in an attribute `breakpoints`, a
    tensor `[n, *batch]`.

    Args:
        num_nodes: how many nodes the first rule has.
        rtol: the relative error that is vouched for.

    References:
        *The exponentially convergent trapezoidal rule* (Trefethen and Weideman, 2014). *Approximation theory and
        approximation practice* (Trefethen, 2013).

    Example:
        >>> import torch
        >>> from torch.distributions import Normal, StudentT
        >>> from torch_klloss.methods import Quadrature
        >>> estimate = Quadrature().estimate(Normal(0.0, torch.tensor([0.5, 1.0])), StudentT(4.0))
        >>> [round(value, 6) for value in estimate.value.tolist()]
        [0.398984, 0.046271]
        >>> estimate.exact, bool((estimate.error_bound < 1e-6 * estimate.value).all())
        (False, True)
    """

    num_nodes: int = 64
    _: KW_ONLY
    rtol: float = 1e-6
    name: ClassVar[str] = "quadrature"

    def __post_init__(self) -> None:
        if isinstance(self.num_nodes, bool) or not isinstance(self.num_nodes, int) or self.num_nodes < 16:
            raise ValueError(f"num_nodes must be an integer of at least 16, got {self.num_nodes!r}.")
        if not 0 < self.rtol < 1:
            raise ValueError(f"rtol must lie strictly between 0 and 1, got {self.rtol!r}.")

    def estimate_checked(
        self, q: Distribution, p: Distribution, batch_shape: torch.Size, generator: torch.Generator | None = None
    ) -> KLEstimate:
        """Return the KL, of the broadcast batch shape, with the bound of its error.

        Raises:
            NotCertifiedError: if the error of any batch element is above `rtol`, or cannot be told; it names the error
                reached, the reason, and the way out.
            NotImplementedError: if the pair is not one-dimensional, or q a discrete law without a sum; under
                `torch.compile` and `torch.func`, where nothing can be refused for its value.
            ValueError: if the shapes do not fit, or q is discrete and p continuous, or the reverse.
            TypeError: if q or p is not a distribution.
        """
        check_common_measure(q, p)
        if is_discrete(q) and _SUM.supports(q, p) is not False:
            return _SUM.estimate_checked(q, p, batch_shape)
        inner_q, inner_p, peeled = simplify(q, p)
        if not _is_open_to(inner_q, inner_p):
            _refuse(q, p)
        dtype = torch.promote_types(torch.promote_types(dtype_of(q), dtype_of(p)), torch.float32)
        shape = torch.broadcast_shapes(inner_q.batch_shape, inner_p.batch_shape)
        if shape.numel() == 0:
            empty = torch.zeros(batch_shape, dtype=dtype, device=device_of(q))
            return KLEstimate(empty, exact=False, error_bound=empty, method=self.name)
        reach = contained(inner_q, inner_p)
        parts = self._integrate(integrand(inner_q, inner_p, None if reach is None else True, shape))
        value, bound = (_sum_last(part.reshape(shape), peeled).expand(batch_shape) for part in parts[:2])
        if dtype != torch.float64:
            bound = bound + torch.finfo(dtype).eps * value.detach().abs().nan_to_num(posinf=0.0)
        return KLEstimate(
            value.to(dtype),
            exact=False,
            error_bound=bound.to(dtype),
            method=self.name,
            num_evaluations=parts[2],
        )

    def supports(self, q: Distribution, p: Distribution) -> bool | None:
        """Tell that the pair is not one-dimensional or cannot be looked at; otherwise only computing can tell."""
        if is_discrete(q):
            return _SUM.supports(q, p)
        return None if _is_open_to(*simplify(q, p)[:2]) else False

    def route(self, q: Distribution, p: Distribution) -> str | None:
        """Return "quadrature", or "enumeration" for a discrete q, which is summed; None for a pair that is refused."""
        if self.supports(q, p) is False:
            return None
        return _SUM.name if is_discrete(q) else self.name

    def _integrate(self, f: Integrand) -> tuple[Tensor, Tensor, int]:
        """Return values and bounds of the flat batch, and how many points the element that took most was looked at."""
        outcomes: list[Outcome] = []
        most = 0
        with torch.no_grad():
            for part, offset in self._chunks(f):
                for state, judgement, evaluations in solve(part, self.num_nodes, self.rtol):
                    why = refusal(state, judgement, self.rtol, self.num_nodes)
                    if why is not None:
                        raise NotCertifiedError(f"{self!r} {why}.")
                    outcomes.append((state.moved(offset), judgement))
                    most = max(most, evaluations)
            order = torch.cat([state.index.flatten() for state, _ in outcomes]).argsort()
            value, bound = (
                torch.cat([part.flatten() for part in parts])[order]
                for parts in zip(*((judgement.value, judgement.error) for _, judgement in outcomes), strict=True)
            )
        if torch.is_grad_enabled():
            value = with_gradient(f, outcomes, value)
        return value, bound, most

    def _chunks(self, f: Integrand) -> Iterator[tuple[Integrand, int]]:
        """Yield the batch in parts that the memory bound allows for, and where each begins."""
        count, size = f.batch_shape.numel(), max(1, _CHUNK // self.num_nodes)
        if not f.is_flat or count <= size:
            yield f, 0
            return
        index = torch.arange(count, device=device_of(f.q))
        for part in index.split(size):
            yield f.select(part), int(part[0])


def _is_open_to(q: Distribution, p: Distribution) -> bool:
    """Return whether a pair is continuous, one-dimensional, on an interval that is known, and may be looked at."""
    if is_traced() or q.event_shape or p.event_shape or is_discrete(q) or is_discrete(p):
        return False
    measure = q.component_distribution if isinstance(q, MixtureSameFamily) else q
    return bounds_of(measure) is not None


def _refuse(q: Distribution, p: Distribution) -> None:
    if is_traced():
        raise NotImplementedError(
            "Quadrature must be able to refuse a value that it cannot vouch for, which torch.compile and torch.func do "
            "not allow; call it outside of them, or use AnalyticKL or MonteCarloKL inside."
        )
    raise NotImplementedError(
        f"Quadrature needs counts, or a q and p that simplify to one dimension, on a support that is an interval, got "
        f"KL({type_name(q)}‖{type_name(p)}); use AutoKL, which takes an exact route where there is one, or "
        "MonteCarloKL."
    )


def _sum_last(t: Tensor, dims: int) -> Tensor:
    return t.sum(tuple(range(-dims, 0))) if dims else t
