"""`audit`: what is wrong with my KL?"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from torch_klloss.auditing.experiment.calling import CallError, isolated
from torch_klloss.auditing.experiment.observation import WrongShapeError
from torch_klloss.auditing.experiment.parameters import Call, SignatureError, adapted, calls_to_try
from torch_klloss.auditing.experiment.signatures import SIGNATURES, SignatureName
from torch_klloss.auditing.judge import Judgement, Settings, judge
from torch_klloss.auditing.report import AuditReport
from torch_klloss.auditing.reporting import report_of, report_of_wrong_shape

Adapter = Callable[[Callable[..., Any], Distribution, Distribution], Tensor]


def audit(
    fn: Callable[..., Any],
    *,
    signature: SignatureName | Adapter = "auto",
    seed: int = 0,
    budget: int = 1280,
    gradient: bool = True,
    num_dims: int | None = None,
) -> AuditReport:
    """Find out whether a hand-written KL is one, and if not, what it is.

    The loss is called with many distributions of several batch and latent sizes, and what it returns is held against
    the KL and against a catalogue of mistakes, alone and together (docs/mistakes.md). Its value and its gradient are
    judged apart. A loss that draws its own samples is called often, and its means are tested; a right loss is
    called wrong with a probability below 1e-6. A convention is not a mistake: the mean or the sum over the
    batch, a value for each example or for each element.

    Args:
        fn: the loss: a function, a bound method, a `functools.partial`, an `nn.Module`. Parameters keep their defaults.
        signature: what it takes; by default its parameters' names tell. "distributions" is fn(q, p) with two `Normal`s
            over [batch, latent] (or, where it does not take these, one of the following), "independent" with the same
            wrapped in `Independent`, "multivariate", "categorical" and "bernoulli" with two of that family;
            "mean_logvar", "mean_std", "mean_logstd", "mean_var" are fn(mean, spread), against a standard Normal;
            "log_probs" is fn(log_q, log_p) at samples of q, [num_samples]; "samples" is fn(z, mean, logvar); "logits"
            is fn(logits_q, logits_p); "kl_div" is fn(input, target) in the order of `F.kl_div`, KL(target‖input), and
            "kl_div_log_target" its log_target=True. Or a function adapter(fn, q, p) that calls the loss with Normals.
        seed: of the probes and of the random streams that the loss finds; the global ones are left alone.
        budget: about how many calls a loss that draws samples gets; the error of its means falls with the root.
        gradient: whether the gradient is judged; without it a number that is logged and not trained with is right too.
        num_dims: of the arguments, such as 3 for [batch, time, latent]; by default two, and others where two raise.

    Returns:
        What was found; printed, it reads as a paragraph. A loss that cannot be called, or returns no number,
        is reported so, and never raises from here.

    Raises:
        ValueError: if there is no such signature.
        TypeError: if `fn` cannot be called at all.

    Example:
        >>> import torch
        >>> from torch_klloss import audit
        >>> def my_kl(mu, logvar):
        ...     return -0.5 * torch.mean(1 + logvar - mu**2 - logvar.exp())
        >>> audit(my_kl).mistakes[0].id
        'mean-over-latent'
        >>> assert audit(lambda mu, logvar: -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1).mean()).ok
    """
    if not callable(fn):
        raise TypeError(f"audit takes a loss that can be called, got {type(fn).__name__}.")
    name = name_of(fn)
    fn = isolated(fn)
    if callable(signature):
        fn, signature = adapted(signature, fn), "distributions"
    try:
        calls = calls_to_try(fn, signature)
    except SignatureError as error:
        return AuditReport(name, "auto", "not judged", reason=f"could not run: {error}".rstrip("."))
    return _audit(fn, name, calls, Settings(seed, budget, gradient, num_dims))


def name_of(fn: Callable[..., Any]) -> str:
    """Return the name of a loss with its parameters, such as "my_kl(mu, logvar)"."""
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__name__", None) or type(inner).__name__
    try:
        parameters = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn).parameters.values()
    except (TypeError, ValueError):
        return f"{name}(…)"
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return f"{name}({', '.join(needed)})"


def _audit(fn: Callable[..., Any], name: str, calls: list[Call], settings: Settings) -> AuditReport:
    failures: list[tuple[Call, CallError]] = []
    judged: list[Judgement] = []
    for call in calls:
        if judged and call.signature is not judged[0].asked.call.signature:
            break  # another family is tried only where the loss does not take the first
        try:
            judgement = judge(fn, call, settings)
        except WrongShapeError as error:
            return report_of_wrong_shape(name, call, error)
        except CallError as error:
            failures.append((call, error))
            continue
        judged.append(judgement)
        if judgement.right:
            break
    if not judged:
        first, reason = failures[0]
        return AuditReport(name, first.signature.name, "not judged", reason=str(reason))
    best = next((judgement for judgement in judged if judgement.right), judged[0])
    report = report_of(name, best, settings.seed)
    if _right_if_independent(best, settings):
        note = "for q and p wrapped in Independent(…, 1) it is right: if that is what it gets, signature='independent'."
        report = replace(report, remarks=(note, *report.remarks))
    return report


def _right_if_independent(judged: Judgement, settings: Settings) -> bool:
    """Return whether a loss of plain Normals that takes a mean too many is right for joint ones."""
    asked = judged.asked
    if asked.call.signature.name != "distributions" or not judged.fits or "mean-over-latent" not in judged.fits[0].ids:
        return False
    call = replace(asked.call, signature=SIGNATURES["independent"])
    try:
        return judge(asked.fn, call, replace(settings, gradient=False, num_dims=None)).right
    except CallError:
        return False
