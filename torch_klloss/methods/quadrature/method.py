"""Quadrature of a one-dimensional KL, with a certified error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily

from torch_klloss.distributions.checks import check_common_measure, type_name
from torch_klloss.distributions.domains import nan_outside
from torch_klloss.distributions.simplify import simplify
from torch_klloss.distributions.stated_supports import is_discrete
from torch_klloss.distributions.supports import bounds_of, contained
from torch_klloss.distributions.tensors import device_of, dtype_of, lacks_float64
from torch_klloss.estimate import KLEstimate, NotCertifiedError
from torch_klloss.methods.base import BaseMethod, estimate_on_host
from torch_klloss.methods.enumeration.method import Enumeration
from torch_klloss.methods.quadrature.certificate import Certificate, refusal
from torch_klloss.methods.quadrature.gradient import with_gradient
from torch_klloss.methods.quadrature.integrand import Integrand, integrand
from torch_klloss.methods.quadrature.solver import solve
from torch_klloss.numerics.arguments import check_integer, check_number
from torch_klloss.numerics.dimensions import sum_last
from torch_klloss.numerics.tracing import is_traced

_SUM = Enumeration()
_CHUNK = 2**17  # elements times nodes in one chunk: 1 MB a tensor, which the caches hold
_LARGE_CHUNK = 2**23  # the same on an accelerator: 64 MB, or more
_MOST_CHUNKS = 4  # there, where the host waits for each


@dataclass(frozen=True)
class Quadrature(BaseMethod):
    """Compute KL(q‖p) = ∫ q (log q - log p) dx of a one-dimensional pair, with a checked error.

    Deterministic, for every q and p with a `log_prob` and a support that is an interval, a half line, the line or the
    circle; `Independent` and shared transforms are taken off first, and the dimensions summed. A mixture q is
    integrated component by component; a discrete q is summed by `Enumeration`. Neither `sample` nor `icdf` is needed:
    the nodes are placed by q's mean and spread, and by a scan of the densities from one end of float64 to the other.
    A trapezoidal rule of `num_nodes` suffices if both are smooth; otherwise Gauss-Legendre panels are split at kinks
    and halved until the error is below the tolerance, with up to forty times as many nodes.

    The value is right to `rtol`, or there is none: if the error of an element stays above `rtol` or is unknown, the
    whole batch is refused with a `NotCertifiedError`. `KLEstimate.error_bound` is the checked estimate of the error:
    from how fast the integrand's expansion converges, whether q adds up to 1 over the nodes, and how well the tails
    beyond them are known. No set of points can rule out a spike between them. An infinite KL is determined from the
    supports, from declared tails (`torch_klloss.distributions.declare_tails`), which are followed through transforms,
    and, for families without declared tails, from a power law of the integrand at the ends of float64.

    The gradient is the gradient of the sum, whose nodes move with the ends of q's support and with nothing else. It is
    as accurate as the value, for the parameters of q and of p alike, even if the support of q depends on them. Near
    q = p the sum has terms ≥ 0 only and keeps its digits. A float32 pair is computed in float64; where its device has
    none, of copies on the CPU. On an accelerator the host waits each time that it looks at the errors: some 15 to 150
    times at 64 nodes for up to 131,072 elements, and at most four times as often for any more, which are integrated in
    four parts at most.

    A user-defined distribution whose log-density has kinks or jumps declares them in an attribute `breakpoints`, a
    tensor `[n, *batch]`.

    Args:
        num_nodes: how many nodes the first rule has.
        rtol: the certified relative error.

    References:
        *The exponentially convergent trapezoidal rule* (Trefethen and Weideman, 2014). *Approximation theory and
        approximation practice* (Trefethen, 2013).

    Examples:
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
        check_integer("num_nodes", self.num_nodes, at_least=16)
        check_number("rtol", self.rtol)
        if not 0 < self.rtol < 1:
            raise ValueError(f"rtol must lie strictly between 0 and 1, got {self.rtol!r}.")

    def estimate_checked(
        self, q: Distribution, p: Distribution, batch_shape: torch.Size, generator: torch.Generator | None = None
    ) -> KLEstimate:
        """Return the KL, of the broadcast batch shape, with the bound of its error.

        Raises:
            NotCertifiedError: if the error of any batch element is above `rtol` or unknown; it names the error
                reached, the reason, and what to do instead. Also if `rtol` is below the rounding of the result.
            NotImplementedError: if the pair is not one-dimensional, or q is discrete and cannot be summed; under
                `torch.compile` and `torch.func`, where no error can depend on a value.
            ValueError: if q is discrete and p continuous, or the reverse.
        """
        check_common_measure(q, p)
        if lacks_float64(q, p):
            return estimate_on_host(self, q, p, batch_shape)
        if is_discrete(q) and _SUM.supports(q, p) is not False:
            return _SUM.estimate_checked(q, p, batch_shape)
        inner_q, inner_p, peeled = simplify(q, p)
        if not _can_integrate(inner_q, inner_p):
            _refuse(q, p)
        dtype = torch.promote_types(dtype_of(q, p), torch.float32)
        self._check_rtol(dtype)
        shape = torch.broadcast_shapes(inner_q.batch_shape, inner_p.batch_shape)
        if shape.numel() == 0:
            empty = torch.zeros(batch_shape, dtype=dtype, device=device_of(q))
            return KLEstimate(empty, exact=False, error_bound=empty, method=self.name)
        # Where p's support does not contain q's, the KL is infinite, whatever its density is.
        contains_support = None if contained(inner_q, inner_p) is None else True
        value, bound, evaluations = self._integrate(integrand(inner_q, inner_p, contains_support, shape))
        value = nan_outside(value.reshape(shape), inner_q, inner_p)
        value, bound = (sum_last(t.reshape(shape), peeled).expand(batch_shape) for t in (value, bound))
        if dtype != torch.float64:
            bound = bound + torch.finfo(dtype).eps * value.detach().abs().nan_to_num(posinf=0.0)
        return KLEstimate(
            value.to(dtype),
            exact=False,
            error_bound=bound.to(dtype),
            method=self.name,
            num_evaluations=evaluations,
        )

    def supports(self, q: Distribution, p: Distribution) -> bool | None:
        """Return False for a pair that is not one-dimensional or is traced, else None: only computing can tell."""
        if is_discrete(q):
            return _SUM.supports(q, p)
        return None if _can_integrate(*simplify(q, p)[:2]) else False

    def route(self, q: Distribution, p: Distribution) -> str | None:
        """Return "quadrature", or "enumeration" for a discrete q, which is summed; None for a pair that is refused."""
        if self.supports(q, p) is False:
            return None
        return _SUM.name if is_discrete(q) else self.name

    def _check_rtol(self, dtype: torch.dtype) -> None:
        """Raise a NotCertifiedError if the result, of this dtype, is rounded by more than the tolerance."""
        rounding = torch.finfo(dtype).eps / 2
        if self.rtol < rounding:
            raise NotCertifiedError(
                f"{self!r} cannot certify a result in {dtype}, which is rounded by {rounding:.1e}: give q and p in "
                f"float64, or an rtol of at least {rounding:.1e}."
            )

    def _integrate(self, f: Integrand) -> tuple[Tensor, Tensor, int]:
        """Return values and error bounds of the flat batch, and the largest number of evaluations of an element."""
        with torch.no_grad():
            certificates = [each for part, index in self._chunks(f) for each in self._certificates(part, index)]
            order = torch.cat([each.state.index.flatten() for each in certificates]).argsort()
            value = torch.cat([each.value.flatten() for each in certificates])[order]
            bound = torch.cat([each.error.flatten() for each in certificates])[order]
        if torch.is_grad_enabled():
            value = with_gradient(f, certificates, value)
        return value, bound, max(each.state.evaluations for each in certificates)

    def _certificates(self, f: Integrand, index: Tensor) -> Iterator[Certificate]:
        """Yield certificates that cover the batch of f; `index` says where it lies in the whole batch."""
        for certificate in solve(f, index, self.num_nodes, self.rtol):
            reason = refusal(certificate, self.rtol, self.num_nodes)
            if reason is not None:
                raise NotCertifiedError(f"{self!r} {reason}.")
            yield certificate

    def _chunk_size(self, f: Integrand) -> int:
        """Return how many elements are integrated at once."""
        if device_of(f.q).type == "cpu":
            return max(1, _CHUNK // self.num_nodes)
        return max(1, _LARGE_CHUNK // self.num_nodes, -(-f.batch_shape.numel() // _MOST_CHUNKS))

    def _chunks(self, f: Integrand) -> Iterator[tuple[Integrand, Tensor]]:
        """Yield the batch in parts that bound the memory, each with the positions of its elements."""
        index, size = torch.arange(f.batch_shape.numel(), device=device_of(f.q)), self._chunk_size(f)
        if not f.is_flat or len(index) <= size:
            yield f, index.reshape(f.batch_shape)
            return
        for part in index.split(size):
            yield f.select(part), part


def _can_integrate(q: Distribution, p: Distribution) -> bool:
    """Return whether a pair is continuous, one-dimensional, on a known interval, and not traced."""
    if is_traced() or q.event_shape or p.event_shape or is_discrete(q) or is_discrete(p):
        return False
    measure = q.component_distribution if isinstance(q, MixtureSameFamily) else q
    return bounds_of(measure) is not None


def _refuse(q: Distribution, p: Distribution) -> NoReturn:
    if is_traced():
        raise NotImplementedError(
            "Quadrature must be able to refuse a value that it cannot certify, which torch.compile and torch.func do "
            "not allow; call it outside of them, or use AnalyticKL or MonteCarloKL inside."
        )
    raise NotImplementedError(
        f"Quadrature needs counts, or a q and p that simplify to one dimension, on a support that is an interval, got "
        f"KL({type_name(q)}‖{type_name(p)}); use AutoKL, which takes an exact route if there is one, or MonteCarloKL."
    )
