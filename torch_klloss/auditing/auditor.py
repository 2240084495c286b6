"""`audit`: the audit of a hand-written KL."""

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
from torch_klloss.auditing.experiment.containment import OutOfTimeError, limited, preserved_state
from torch_klloss.auditing.experiment.observation import WrongShapeError
from torch_klloss.auditing.experiment.parameters import (
    OTHER_FAMILIES,
    Binding,
    SignatureError,
    adapted,
    bindings_to_try,
)
from torch_klloss.auditing.experiment.signatures import SIGNATURES, SignatureName
from torch_klloss.auditing.experiment.whole_loss import whole_loss
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
    timeout: float | None = None,
) -> AuditReport:
    """Find out whether a hand-written KL is right, and if not, what it computes.

    The loss is called with many distributions of several batch and latent sizes, and its values are compared with the
    KL and with a catalogue of mistakes, alone and together (docs/mistakes.md). Value and gradient are judged
    separately. A loss that draws its own samples is called often, and its means are tested; a right loss is
    called wrong with a probability below 1e-6. A convention is not a mistake: the mean or the sum over the
    batch, a value for each example or for each element.

    Args:
        fn: the loss: a function, a bound method, a `functools.partial`, an `nn.Module`. Parameters keep their defaults.
        signature: its arguments; by default determined from the names of its parameters. "distributions" is fn(q, p)
            with two `Normal`s over [batch, latent] (or, where it does not take these, one of the following),
            "independent" with the same wrapped in `Independent`, "multivariate", "categorical" and "bernoulli" with two
            of that family;
            "mean_logvar", "mean_std", "mean_logstd", "mean_var", "mean_rho" are fn(mean, spread), against a standard
            Normal; "means_logvars", "means_stds", "means_logstds", "means_vars" are fn(q_mean, q_spread, p_mean,
            p_spread); "log_probs" is fn(log_q, log_p) at samples of q, [num_samples]; "samples" is fn(z, mean, logvar);
            "logits" is fn(logits_q, logits_p); "token_logits" is fn(logits_q, logits_p, mask) of language models,
            [batch, time, vocabulary] and [batch, time]; "kl_div" is fn(input, target) in the order of `F.kl_div`,
            KL(target‖input), and "kl_div_log_target" its log_target=True; "uniform_logits", "uniform_probs" and
            "uniform_log_probs" are fn(logits) and its like, against the uniform distribution. Or a function
            adapter(fn, q, p) that calls the loss with Normals. Of a whole loss of a VAE, fn(recon_x, x, mean, logvar)
            by the names of its parameters, the KL is judged where its reconstruction is zero; a note says of what part.
        seed: of the probes and of the random streams during the calls; the global streams are restored.
        budget: the approximate number of calls of a loss that draws samples; more calls make the test of its means
            sharper, with the square root.
        gradient: whether the gradient is judged; if not, a number for logging, without gradient, is right too.
        num_dims: of the arguments, such as 3 for [batch, time, latent]; by default two, and others where two raise.
        timeout: the seconds after which a loss that has not been judged will not be; by default none.

    Returns:
        The findings; printed, they read as a paragraph. A loss that cannot be called, or returns no number, gets a
        report that says so; its errors are not raised.

    Raises:
        ValueError: if `signature` is unknown.
        TypeError: if `fn` is not callable.

    Examples:
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
    try:
        with preserved_state(), limited(timeout):
            return _of_isolated(isolated(fn), name, signature, Settings(seed, budget, gradient, num_dims))
    except OutOfTimeError:
        if timeout is None:
            raise  # it is the caller's limit
        return AuditReport(name, "auto", "not judged", reason=f"it was not judged within {timeout:g} s")


def _of_isolated(
    fn: Callable[..., Any], name: str, signature: SignatureName | Adapter, settings: Settings
) -> AuditReport:
    if callable(signature):
        fn, signature = adapted(signature, fn), "distributions"
    whole = whole_loss(fn)
    try:
        bindings = bindings_to_try(whole or fn, signature)
    except SignatureError as error:
        way_out = ". For the KLs of its training step: audit_module(module, batch)" * hasattr(fn, "training_step")
        return AuditReport(name, "auto", "not judged", reason=f"could not run: {error}".rstrip(".") + way_out)
    report = _audit(whole or fn, name, bindings, settings)
    return report if whole is None else replace(report, remarks=(whole.note, *report.remarks))


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


def _audit(fn: Callable[..., Any], name: str, bindings: list[Binding], settings: Settings) -> AuditReport:
    failures: list[tuple[Binding, CallError]] = []
    judgements: list[Judgement] = []
    for binding in bindings:
        if judgements and binding.signature.name in OTHER_FAMILIES:
            break  # another family is tried only where the loss does not take the first
        try:
            judgements.append(judge(fn, binding, settings))
        except WrongShapeError as error:
            return report_of_wrong_shape(name, binding, error)
        except CallError as error:
            failures.append((binding, error))
            continue
        if judgements[-1].right:
            break
    if not judgements:
        first, reason = failures[0]
        return AuditReport(name, first.signature.name, "not judged", reason=str(reason))
    best = judgements[-1] if judgements[-1].right else judgements[0]
    report = report_of(name, best, settings.seed)
    if _right_if_independent(best, settings):
        note = "for q and p wrapped in Independent(…, 1) it is right: if that is what it gets, signature='independent'."
        report = replace(report, remarks=(note, *report.remarks))
    return report


def _right_if_independent(judgement: Judgement, settings: Settings) -> bool:
    """Return whether a loss with a mean over the latents is right for q and p wrapped in `Independent`."""
    subject = judgement.subject
    mistakes = judgement.fits[0].ids if judgement.fits else frozenset()
    if subject.signature.name != "distributions" or "mean-over-latent" not in mistakes:
        return False
    binding = replace(subject.binding, signature=SIGNATURES["independent"])
    try:
        return judge(subject.fn, binding, replace(settings, gradient=False, num_dims=None)).right
    except CallError:
        return False
