"""Property tests for your own KL: `check_kl(q, p)` in your own tests.

The laws that every KL obeys are checked for one pair of instances. Nothing here needs a test framework.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from torch_klloss.closed_forms import kl_divergence
from torch_klloss.distributions.checks import check_pair, type_name
from torch_klloss.distributions.densities import log_density
from torch_klloss.distributions.supports import has_moving_support
from torch_klloss.distributions.tensors import copy_with, device_of, tensors_of, unvalidated
from torch_klloss.estimate import KLEstimate
from torch_klloss.methods import Enumeration, FirstOf, MonteCarlo, Quadrature
from torch_klloss.numerics.arguments import check_integer
from torch_klloss.numerics.special import student_t_quantile
from torch_klloss.rng import private_rng
from torch_klloss.testing.leaves import derivatives, with_leaves

KL = Callable[[Distribution, Distribution], Tensor]

_LEVEL = 1 - 1e-7  # of the intervals: one false alarm in ten million correct numbers
_REPLICATES = 32  # of a sampled gradient, for its error


@dataclass(frozen=True)
class KLReport:
    """The checks of `check_kl` that passed.

    Attributes:
        value: the KL that was checked, `[*batch]`.
        reference: the KL that it was compared with; its `method` says how it was computed.
        passed: the names of the checks that passed.
        skipped: the checks that could not be made, by name, with the reason.
    """

    value: Tensor
    reference: KLEstimate
    passed: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)


def check_kl(
    q: Distribution, p: Distribution, *, kl: KL = kl_divergence, num_samples: int = 2**16, seed: int = 0
) -> KLReport:
    """Check the KL of a pair against its definition and the laws that every KL obeys.

    The value and its gradient are compared with an exact sum where q's support can be enumerated, with a quadrature
    where one certifies itself, and else with samples; then the tolerance is the sampling error, and smaller mistakes
    are not found. The KL also has to be ≥ 0, 0 at q = p, NaN for NaN parameters, of the broadcast
    batch shape and the dtype of the parameters, the same for expanded batches, and additive over `Independent`.

    The gradient is taken to the leaf tensors behind q and p that require one, and if there are none to the parameters
    named in `arg_constraints`. Build the pair in float64: in float32 the tolerances are wider.

    Args:
        q: the distribution that the expectation is under.
        p: the other one. Choose it different from q: near q the KL and its gradient are small, and so are mistakes.
        kl: the KL that is checked; by default the closed form that is registered for the pair.
        num_samples: the number of draws, if the reference is sampled.
        seed: the seed of the draws; the global random stream is not used.

    Returns:
        The checks that were made, and those that could not be.

    Raises:
        AssertionError: if a check fails: the expectation, the value, and where to look, for every failed check.
        NotImplementedError: if no closed form is registered for the pair.
        TypeError, ValueError: if an argument is of a wrong kind, or the shapes of q and p do not fit.

    Examples:
        >>> import torch
        >>> from torch.distributions import Exponential, kl_divergence
        >>> from torch_klloss.testing import check_kl
        >>> q, p = Exponential(torch.tensor(2.0).double()), Exponential(torch.tensor(0.5).double())
        >>> check_kl(q, p).reference.method
        'quadrature'
        >>> check_kl(q, p, kl=lambda q, p: kl_divergence(p, q))
        Traceback (most recent call last):
        AssertionError: KL(Exponential‖Exponential) fails 2 of 9 checks:
          value: expected 0.636294 by quadrature, got 1.61371; KL(p‖q) is 1.61371: are q and p swapped?
          gradient: expected d KL/d q.rate = 0.375, got 1.5; compare it with autograd's.
    """
    check_pair(q, p)
    check_integer("num_samples", num_samples)
    check_integer("seed", seed, at_least=None)
    if not callable(kl):
        raise TypeError(f"kl must be a function of q and p, such as kl_divergence, got {kl!r}.")
    case = _Case(q, p, kl, num_samples, seed)
    passed, skipped, failed = [], {}, []
    for title, check in _CHECKS.items():
        try:
            check(case)
        except _SkippedError as reason:
            skipped[title] = str(reason)
        except _FailedError as failure:
            failed.append(f"  {title}: {failure}")
        else:
            passed.append(title)
    if failed:
        title = f"KL({type_name(q)}‖{type_name(p)}) fails {len(failed)} of {len(_CHECKS)} checks:"
        raise AssertionError("\n".join((title, *failed)))
    return KLReport(case.value.detach(), case.reference, tuple(passed), skipped)


class _SkippedError(Exception):
    """The reason why a check cannot be made."""


class _FailedError(Exception):
    """The expectation, the value, and what to do about it."""


@dataclass(frozen=True)
class _Case:
    """The pair, and numbers that are computed once."""

    q: Distribution
    p: Distribution
    kl: KL
    num_samples: int
    seed: int

    @cached_property
    def batch_shape(self) -> torch.Size:
        return check_pair(self.q, self.p)

    @cached_property
    def value(self) -> Tensor:
        return self.kl(self.q, self.p)

    @cached_property
    def reference(self) -> KLEstimate:
        with torch.no_grad():
            return self.estimate(self.q, self.p, self.num_samples, self.seed)

    @cached_property
    def rounding(self) -> float:
        """The allowed rounding of a formula: 100 roundings of terms as large as in the definition."""
        size = 1.0
        with torch.no_grad(), private_rng(self.seed, device_of(self.q)), suppress(NotImplementedError, RuntimeError):
            x = self.q.sample(torch.Size((256,)))  # or q cannot be drawn from
            log_p = log_density(self.p, x, None)
            size += (unvalidated(self.q).log_prob(x).abs() + log_p.nan_to_num(0.0, 0.0, 0.0).abs()).mean().item()
        return 100 * torch.finfo(self.value.dtype).eps * size

    def estimate(self, q: Distribution, p: Distribution, num_samples: int, seed: int) -> KLEstimate:
        # The score function is exact, and the implicit gradient of a Gamma's rsample is not.
        sampled = MonteCarlo(num_samples, gradient="pathwise" if has_moving_support(q) else "score_function")
        method = FirstOf(Enumeration(), Quadrature(256), sampled)
        return method.estimate(q, p, torch.Generator(device_of(q)).manual_seed(seed))


# --- the checks -------------------------------------------------------------------------------------------------------


def _shape(case: _Case) -> None:
    if case.value.shape != case.batch_shape:
        raise _FailedError(
            f"expected the broadcast batch shape {tuple(case.batch_shape)}, got {tuple(case.value.shape)}; sum over "
            "the event dimensions, and over nothing else."
        )


def _dtype(case: _Case) -> None:
    for dtype in (torch.float64, torch.float32):
        q, p = (_cast(d, dtype) for d in (case.q, case.p))
        if (got := case.kl(q, p).dtype) != dtype:
            raise _FailedError(f"expected {dtype} for parameters of that dtype, got {got}; create constants like them.")


def _value(case: _Case) -> None:
    try:
        value, expected = torch.broadcast_tensors(case.value.detach().double(), case.reference.value.double())
    except RuntimeError:
        raise _SkippedError("the shape is wrong") from None  # another check is for a wrong shape
    low, high = (end.double() for end in case.reference.interval(_LEVEL))
    is_right = (value >= low - case.rounding) & (value <= high + case.rounding) | (value == expected)
    if not is_right.all():
        i = int((~is_right.flatten()).int().argmax())
        got, wanted = value.flatten()[i].item(), expected.flatten()[i].item()
        width = ((high - low) / 2).expand(value.shape).flatten()[i].item()
        error = "" if case.reference.std_error is None else f" ± {width:.2g}"
        raise _FailedError(
            f"expected {wanted:.6g}{error} by {case.reference.method}, got {got:.6g}; "
            f"{_suspect(case, got, wanted, width)}"
        )


def _not_negative(case: _Case) -> None:
    least = case.value.min().item()
    if least < -case.rounding:
        raise _FailedError(f"expected at least 0, got {least:.6g}; is a term missing, or a sign turned?")


def _zero(case: _Case) -> None:
    found = 0
    for which, d in (("q", case.q), ("p", case.p)):
        try:
            largest = case.kl(d, d).abs().max().item()
        except NotImplementedError:
            continue
        found += 1
        if not largest <= case.rounding:
            raise _FailedError(
                f"expected KL({which}‖{which}) = 0, got {largest:.6g}; take differences before logarithms."
            )
    if not found:
        raise _SkippedError("there is no KL of a distribution with itself here")


def _gradient(case: _Case) -> None:
    if not case.reference.value.isfinite().all():
        raise _SkippedError("the KL is not finite")
    try:
        q, p, leaves = with_leaves(case.q, case.p)
    except ValueError as error:
        raise _SkippedError(str(error)) from error
    got = derivatives(case.kl(q, p), leaves.values())
    expected, errors = _expected_derivatives(case, q, p, list(leaves.values()))
    largest = max(each.abs().max().item() for each in expected)
    # A certified quadrature has its gradient to 1e-6; the second term is the rounding of a formula.
    floor = 1e-5 * largest + case.rounding * (1 + largest)
    for which, mine, right, width in zip(leaves, got, expected, errors, strict=True):
        is_wrong = ~((mine - right).abs() <= width + floor)
        if is_wrong.any():
            i = int(is_wrong.flatten().int().argmax())
            came, wanted = mine.flatten()[i].item(), right.flatten()[i].item()
            hint = (
                "is it computed under no_grad, or of a detached tensor?" if came == 0 else "compare it with autograd's."
            )
            within = f" ± {width.flatten()[i].item():.2g}" if width.any() else ""
            raise _FailedError(f"expected d KL/d {which} = {wanted:.6g}{within}, got {came:.6g}; {hint}")


def _nan(case: _Case) -> None:
    sides = {"q": case.q, "p": case.p}
    fixed = [side for side, d in sides.items() if not any(t.is_floating_point() for t in tensors_of(d))]
    for which in (side for side in sides if side not in fixed):
        pair = {side: unvalidated(d) for side, d in sides.items()}
        pair[which] = copy_with(
            pair[which], lambda t, *_: torch.full_like(t, torch.nan) if t.is_floating_point() else t
        )
        try:
            value = case.kl(pair["q"], pair["p"])
        except (RuntimeError, ValueError) as error:
            first_line = str(error).partition("\n")[0]
            raise _FailedError(
                f"expected NaN for NaN parameters of {which}, got {type(error).__name__}: {first_line}"
            ) from error
        if not value.isnan().all():
            raise _FailedError(
                f"expected NaN for NaN parameters of {which}, got {value.flatten()[0].item():.6g}; "
                "a comparison with NaN is false: choose the branch of torch.where so that it is kept."
            )
    if fixed:
        raise _SkippedError(f"{' and '.join(fixed)} {'has' if len(fixed) == 1 else 'have'} no parameter to make NaN")


def _broadcasting(case: _Case) -> None:
    shape = case.batch_shape
    value = case.kl(_expanded(case.q, (3, 1, *shape)), _expanded(case.p, (2, *shape)))
    if value.shape != (3, 2, *shape):
        raise _FailedError(
            f"expected the shape {(3, 2, *shape)} for batch shapes {(3, 1, *shape)} and {(2, *shape)}, got "
            f"{tuple(value.shape)}; every parameter of q and of p must take part."
        )
    _expect_equal(
        case, value, case.value.expand(value.shape), "in a batch that broadcasts", "does an index know the shape?"
    )


def _additivity(case: _Case) -> None:
    dims = len(case.batch_shape) + 1
    q, p = (Independent(_expanded(d, (3, *case.batch_shape)), dims) for d in (case.q, case.p))
    try:
        value = case.kl(q, p)
    except (NotImplementedError, AttributeError) as error:  # a function of the two types alone
        raise _SkippedError("what is checked takes no Independent") from error
    _expect_equal(case, value, 3 * case.value.sum(), "of three independent copies", "the KL of a product is the sum.")


_CHECKS: dict[str, Callable[[_Case], None]] = {
    "shape": _shape,
    "dtype": _dtype,
    "value": _value,
    "not negative": _not_negative,
    "zero at q = p": _zero,
    "gradient": _gradient,
    "NaN": _nan,
    "broadcasting": _broadcasting,
    "additivity": _additivity,
}


# --- helpers ----------------------------------------------------------------------------------------------------------


def _cast(d: Distribution, dtype: torch.dtype) -> Distribution:
    return copy_with(d, lambda t, *_: t.to(dtype) if t.is_floating_point() else t)


def _expanded(d: Distribution, shape: tuple[int, ...]) -> Distribution:
    try:
        return d.expand(torch.Size(shape))
    except NotImplementedError as error:
        raise _SkippedError(f"{type(d).__name__} has no expand; define it, and batches can be checked") from error


def _expect_equal(case: _Case, value: Tensor, expected: Tensor, where: str, hint: str) -> None:
    size = 1 + expected.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    is_right = ((value - expected).abs() <= case.rounding * size) | (value == expected)
    if not is_right.all():
        i = int((~is_right.flatten()).int().argmax())
        wanted, got = expected.expand(value.shape).flatten()[i].item(), value.flatten()[i].item()
        raise _FailedError(f"expected {wanted:.6g} {where}, got {got:.6g}; {hint}")


def _suspect(case: _Case, got: float, expected: float, width: float) -> str:
    """Return the well-known mistake that it looks like, or advice."""
    with torch.no_grad():
        try:
            swapped = case.estimate(case.p, case.q, case.num_samples, case.seed).value
        except (NotImplementedError, ValueError):
            swapped = case.value.new_tensor(torch.nan)
    near = width + 1e-3 * abs(expected)
    if ((swapped - got).abs() <= width + 1e-3 * abs(got)).any():
        return f"KL(p‖q) is {got:.6g}: are q and p swapped?"
    if abs(got / 2 - expected) <= near:
        return "that is twice the KL: is a factor ½ missing?"
    if abs(2 * got - expected) <= near:
        return "that is half the KL."
    return "compare each term with E_q[log q - log p]; draws from q already carry the weight q."


def _expected_derivatives(
    case: _Case, q: Distribution, p: Distribution, leaves: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of the reference, and the half-width of their interval: 0 if it is not sampled."""
    if case.reference.std_error is None:
        expected = derivatives(case.estimate(q, p, 1, case.seed).value, leaves)
        return expected, [torch.zeros_like(each) for each in expected]
    share = max(2, case.num_samples // _REPLICATES)
    draws = [derivatives(case.estimate(q, p, share, case.seed + i).value, leaves) for i in range(_REPLICATES)]
    stacked = [torch.stack(each) for each in zip(*draws, strict=True)]
    width = student_t_quantile(0.5 + _LEVEL / 2, _REPLICATES - 1).item() / _REPLICATES**0.5
    return [each.mean(0) for each in stacked], [width * each.std(0) for each in stacked]
