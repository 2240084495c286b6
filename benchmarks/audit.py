"""Are the audit's mistakes found and named, how often is a right loss called wrong, and how long does it take?

For every signature each mistake of the catalogue that can occur in it is made, alone and together with every other that
can be made with it, by losses that compute as a user would (`lib/made_losses.py`), and each loss is audited. A loss is
left out if a mistake has no effect on its value, alone or beside the other, at inputs that the audit does not use.
"exact" is a report with these very mistakes; "one of several" lists them as an alternative, and the two
losses do agree on such inputs: to 1e-9, or where they sample in the mean of 1000 calls; "same function" names other
mistakes that, made, agree in the same way.

The right losses are those of `tests/auditing/correct_losses.py`, with many seeds: none may be called wrong.

Before anything is timed, every made loss without a mistake has to be the KL, and every single mistake has to return
what the catalogue's own example returns; otherwise exit status 1, as for a mistake that is not detected and a right
loss that is called wrong. One thread.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F  # noqa: N812 -- as the catalogue's examples have it
from common import Row, argument_parser, finish, median, show
from lib.made_losses import Loss, MadeLoss, Reduction, made, made_of_gradient
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

import torch_klloss
from torch_klloss.auditing import CATALOGUE, AuditReport, Mistake, audit
from torch_klloss.auditing.experiment.probes import Layout
from torch_klloss.auditing.experiment.signatures import SIGNATURES, Leaves
from torch_klloss.auditing.explanation.mistake import ANALYTIC, CATEGORICAL, SAMPLED, hypotheses

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.auditing.correct_losses import CORRECT
from tests.auditing.losses import Loss as RightLoss

MADE = [name for name, signature in SIGNATURES.items() if not signature.masked]  # the losses of tokens are examples
BY_ID = {mistake.id: mistake for mistake in CATALOGUE}
VALUE_MISTAKES = [mistake for mistake in CATALOGUE if mistake.gradient is None]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
FRESH = 987_654  # a seed that no audit here has
STOCHASTIC_PAIRS, QUICK_EXACT, QUICK_MEANS, QUICK_RIGHT = 60, 10, 1, 8
NUM_CALLS, QUICK_CALLS = 1000, 150
NAMED = ("exact", "as one of several")
MISSED = ("not detected", "not judged")
COLUMNS = {
    "signature": "signature",
    "kind": "values",
    "made": "made|d",
    "detected": "detected|d",
    "exact": "exact|d",
    "as one of several": "one of several|d",
    "same function": "same function|d",
    "otherwise": "otherwise|d",
    "named": "named|.1%",
    "median_s": "median (s)|.2f",
    "max_s": "max (s)|.2f",
}
RIGHT_COLUMNS = {
    "kind": "right losses",
    "losses": "losses|d",
    "seeds": "seeds|d",
    "audits": "audits|d",
    "alarms": "called wrong|d",
    "median_s": "median (s)|.2f",
    "max_s": "max (s)|.2f",
}


@dataclass(frozen=True)
class Case:
    """A wrong loss and the mistakes that it makes.

    Attributes:
        signature: what it takes.
        form: how it computes.
        mistakes: what it makes.
        loss: itself.
        reduction: of the examples.
        joint: whether densities are summed over the latent dimensions first.
        is_example: whether it is the catalogue's own line.
        num_dims: of the arguments.
    """

    signature: str
    form: str
    mistakes: tuple[Mistake, ...]
    loss: Loss = field(compare=False)
    reduction: Reduction = "mean"
    joint: bool = False
    is_example: bool = False
    num_dims: int = 2

    @property
    def ids(self) -> frozenset[str]:
        """The names of the mistakes."""
        return frozenset(mistake.id for mistake in self.mistakes)

    @property
    def stochastic(self) -> bool:
        """Whether a mean has to be tested: of draws of its own, or of given samples."""
        return self.form == SAMPLED or SIGNATURES[self.signature].given_samples

    @property
    def gradient_only(self) -> bool:
        """Whether its value is right."""
        return any(mistake.gradient is not None for mistake in self.mistakes)


# --- what is made -----------------------------------------------------------------------------------------------------


def example(mistake: Mistake) -> Case:
    """Return the catalogue's own wrong loss."""
    scope = {"torch": torch, "F": F, "math": math, "kl_divergence": kl_divergence, "torch_klloss": torch_klloss}
    signature = SIGNATURES[mistake.signature]
    loss: Loss = eval(f"lambda {', '.join(signature.roles)}: {mistake.wrong}", scope)
    draws = any(word in mistake.wrong for word in ("randn", "rand_like", "sample("))
    form = SAMPLED if draws or signature.given_samples else CATEGORICAL if signature.categorical else ANALYTIC
    return Case(mistake.signature, form, (mistake,), loss, is_example=True, num_dims=mistake.num_dims)


def forms(signature: str) -> tuple[str, ...]:
    """Return in which forms a loss of that signature can compute."""
    if SIGNATURES[signature].categorical:
        return (CATEGORICAL,)
    return (SAMPLED,) if signature == "log_probs" else (ANALYTIC, SAMPLED)


def cases_of(signature: str) -> Iterator[Case]:
    """Return every mistake of the value, alone and in pairs, and every one of the gradient that can be made."""
    as_formula: set[frozenset[str]] = set()
    for form in forms(signature):
        for index, hypothesis in enumerate(hypotheses(VALUE_MISTAKES, form, signature)):
            if not hypothesis.mistakes or (len(hypothesis.mistakes) > 1 and hypothesis.ids in as_formula):
                continue
            if SIGNATURES[signature].given_samples and form == SAMPLED and "direction" in hypothesis.parts:
                continue  # samples of q are no samples of p
            concerns_batch = hypothesis.parts.keys() & {"batch", "repeated"}
            reduction: Reduction = "mean" if concerns_batch else REDUCTIONS[index % len(REDUCTIONS)]
            joint = signature in ("independent", "multivariate") or index % 2 == 0
            loss = made(signature, hypothesis.mistakes, form, reduction=reduction, joint=joint)
            if loss is None:
                raise RuntimeError(f"{sorted(hypothesis.ids)} can be combined in {form}, and no loss could be made")
            as_formula |= {hypothesis.ids} if form == ANALYTIC else set()
            yield Case(signature, form, hypothesis.mistakes, loss, reduction, joint)
    for mistake in CATALOGUE:
        if mistake.gradient is not None and (found := made_of_gradient(signature, mistake)) is not None:
            yield Case(signature, found[1], (mistake,), found[0])


def outputs(loss: Loss, signature: str, stream: int = 0) -> Tensor:
    """Return the values of a loss at the fresh inputs, with draws from one stream, laid end to end."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(stream)
        return torch.cat([loss(*SIGNATURES[signature].arguments(one)).reshape(-1) for one in fresh(signature)])


@cache
def fresh(signature: str) -> list[Leaves]:
    """Return the leaves of four probes that no audit here uses."""
    layout, leaves = SIGNATURES[signature].draw(FRESH, rank=2)
    parts = {name: layout.split(leaf) for name, leaf in leaves.items()}
    return [{name: part[probe] for name, part in parts.items()} for probe in range(4)]


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two losses agree on the same inputs and draws, to 1e-9 or to float32's rounding."""
    if one.shape != other.shape:
        return False
    tolerance = 1e-9 if one.dtype == other.dtype == torch.float64 else 1e-6
    return torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def fewer(case: Case) -> Iterator[MadeLoss]:
    """Return the losses that make fewer of the mistakes, none included, in every reduction that could hide one."""
    repeats = "repeated" in {name for mistake in case.mistakes for name in mistake.parts(case.form) or ()}
    for kept in ((), *((mistake,) for mistake in case.mistakes if len(case.mistakes) > 1)):
        for reduction in (case.reduction, "none") if repeats else (case.reduction,):
            loss = made(case.signature, kept, case.form, reduction=reduction, joint=case.joint)
            if loss is not None:
                yield loss
                if "repeated" in loss.parts:  # every example gets the mean, instead of the sum: a convention
                    yield replace(loss, parts={**loss.parts, "batch": -1})


def has_effect(case: Case) -> bool:
    """Return whether all its mistakes have an effect: no loss with fewer of them returns the same."""
    if case.gradient_only or case.is_example:
        return True
    own = outputs(case.loss, case.signature)
    return not any(same(own, outputs(loss, case.signature)) for loss in fewer(case))


# --- what has to hold before ------------------------------------------------------------------------------------------


def exact_kl(signature: str) -> Tensor:
    """Return the mean of torch's KL over the examples of the probes of `outputs`."""
    found = []
    for leaves in fresh(signature):
        shape = next(iter(leaves.values())).shape
        pair: Any = SIGNATURES[signature].pair({n: leaf.reshape(-1) for n, leaf in leaves.items()}, Layout((shape,)))
        if SIGNATURES[signature].categorical:
            scores = [side.reshape(shape) for side in (pair.q_logits, pair.p_logits)]
            if signature == "bernoulli":
                scores = [torch.stack([side, torch.zeros_like(side)], -1) for side in scores]
            kl = kl_divergence(*(Categorical(logits=side) for side in scores))
        else:
            q, p = Normal(pair.q_mean, (0.5 * pair.q_logvar).exp()), Normal(pair.p_mean, (0.5 * pair.p_logvar).exp())
            kl = kl_divergence(q, p).reshape(shape)
        found.append(kl.sum() / shape[0])
    return torch.stack(found)


def check(num_calls: int) -> list[str]:
    """Return the made losses that do not compute what their mistakes say, in words; draws are averaged over calls."""
    wrong = []
    for signature in MADE:
        kl = exact_kl(signature)
        for form in forms(signature):
            right = MadeLoss(signature, form, {})
            if not (near(right, kl, num_calls // 5) if form == SAMPLED else same(outputs(right, signature), kl)):
                wrong.append(f"the {form} loss of {signature} without a mistake is not the KL")
    for mistake in VALUE_MISTAKES:
        if mistake.num_dims != 2:
            continue  # the losses here are made in two
        own = example(mistake)
        tried = (made(own.signature, (mistake,), own.form, joint=joint) for joint in (False, True))
        is_drawn = "draws" in (mistake.sampled or {})
        agrees = partial(same_on_average, num_calls=num_calls) if is_drawn else same_on_draws
        if not any(loss is not None and agrees(loss, own.loss, own.signature) for loss in tried):
            wrong.append(f"{mistake.id}: the loss made in {mistake.signature} is not the catalogue's example")
    return wrong


def average(loss: Loss, signature: str, streams: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the mean over independent calls, and its standard error."""
    calls = torch.stack([outputs(loss, signature, stream) for stream in streams])
    return calls.mean(0), calls.std(0) / math.sqrt(len(streams))


def near(loss: MadeLoss, expected: Tensor, num_calls: int) -> bool:
    """Return whether the mean of a loss is within five standard errors of what is expected."""
    mean, error = average(loss, loss.signature, range(num_calls))
    return bool(((mean - expected).abs() <= 5 * error).all())


def same_on_draws(one: Loss, other: Loss, signature: str) -> bool:
    """Return whether two losses agree, draw for draw."""
    return same(outputs(one, signature), outputs(other, signature))


def same_on_average(one: Loss, other: Loss, signature: str, num_calls: int) -> bool:
    """Return whether the means of two losses over independent calls, more than an audit's, are within five errors."""
    (mean, error), (others, other_error) = (
        average(loss, signature, range(start, start + num_calls)) for loss, start in ((one, 0), (other, num_calls))
    )
    return mean.shape == others.shape and bool(((mean - others).abs() <= 5 * torch.hypot(error, other_error)).all())


# --- what the audit says ----------------------------------------------------------------------------------------------


def coincides(case: Case, ids: Sequence[str], *, on_average: bool = False) -> bool:
    """Return whether a loss that makes the mistakes of these names returns the same, at the fresh inputs."""
    if case.gradient_only or case.signature not in MADE or any(name not in BY_ID for name in ids):
        return False
    mistakes = [BY_ID[name] for name in ids if BY_ID[name].gradient is None]  # no gradient flows from a constant
    tried = [
        loss
        for form in forms(case.signature)
        for joint in ((True, False) if form == SAMPLED else (False,))
        if (loss := made(case.signature, mistakes, form, reduction=case.reduction, joint=joint)) is not None
    ]
    if any(same_on_draws(case.loss, loss, case.signature) for loss in tried):
        return True
    return on_average and any(same_on_average(case.loss, loss, case.signature) for loss in tried)


def judged(case: Case, report: AuditReport) -> str:
    """Return how the report names what was made."""
    if report.ok:
        return "not detected"
    if report.verdict == "not judged":
        return "not judged"
    ids = [finding.id for finding in report.mistakes]
    if frozenset(ids) == case.ids:
        return "exact"
    if " and ".join(sorted(case.ids)) in report.mistakes[0].alternatives:
        return (
            "as one of several"
            if coincides(case, ids, on_average=case.form == SAMPLED)
            else "one of several that differ"
        )
    return "same function" if coincides(case, ids) else "otherwise"


def row_of(case: Case) -> Row:
    """Audit one wrong loss."""
    begin = time.perf_counter()
    try:
        num_dims = case.num_dims if case.num_dims != 2 else None
        report = audit(case.loss, signature=case.signature, num_dims=num_dims)  # type: ignore[arg-type]
    except Exception as error:  # no loss may cause one
        report = AuditReport(
            "", case.signature, "not judged", reason=f"the audit raises {type(error).__name__}: {error}"
        )
    seconds = time.perf_counter() - begin
    return {
        "signature": case.signature,
        "kind": "means" if case.stochastic else "exact",
        "form": case.form,
        "made": " + ".join(sorted(case.ids)),
        "how": "example"
        if case.is_example
        else f"{case.reduction}{', joint' if case.joint and case.form == SAMPLED else ''}",
        "named": " + ".join(finding.id for finding in report.mistakes) or report.reason or report.verdict,
        "alternatives": list(report.mistakes[0].alternatives) if report.mistakes else [],
        "outcome": judged(case, report),
        "seconds": seconds,
    }


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each signature and kind of values, and one for all of a kind."""
    table = []
    kinds = ("exact", "means")
    for signature, kind in [(s, k) for k in kinds for s in (*SIGNATURES, "all")]:
        own = [row for row in rows if row["kind"] == kind and signature in (row["signature"], "all")]
        if not own:
            continue
        count = Counter(row["outcome"] for row in own)
        detected = len(own) - sum(count[name] for name in MISSED)
        shown = {name: count[name] for name in (*NAMED, "same function")}
        seconds = [row["seconds"] for row in own]
        table.append(
            {
                "signature": signature,
                "kind": kind,
                "made": len(own),
                "detected": detected,
                **shown,
                "otherwise": detected - sum(shown.values()),
                "named": sum(count[name] for name in NAMED) / len(own),
                "median_s": median(seconds),
                "max_s": max(seconds),
            }
        )
    return table


# --- right losses -----------------------------------------------------------------------------------------------------


def signature_of(loss: RightLoss) -> str:
    """Return the signature that an audit gets for a right loss of the corpus."""
    if loss.takes == "distributions":
        return "distributions" if loss.family == "normal" else loss.family
    return loss.signature or "auto"


def rows_of_right(cases: Iterable[tuple[int, RightLoss]], minutes: float) -> tuple[list[Row], list[str]]:
    """Audit right losses until the time is over; return their times, and the reports that call one wrong."""
    rows: list[Row] = []
    alarms = []
    begin = time.perf_counter()
    for seed, loss in cases:
        started = time.perf_counter()
        if started - begin > 60 * minutes:
            break
        report = audit(loss.fn, signature=signature_of(loss), gradient=loss.gradient != "value only", seed=seed)  # type: ignore[arg-type]
        rows.append({"loss": loss.name, "seed": seed, "ok": report.ok, "seconds": time.perf_counter() - started})
        if not report.ok:
            alarms.append(f"{loss.name} is right, and with seed {seed} the report says: {report}")
    return rows, alarms


def summary_of_right(kind: str, rows: Sequence[Row]) -> Row:
    """Return the counts of one kind of right losses."""
    seconds = [row["seconds"] for row in rows]
    return {
        "kind": kind,
        "losses": len({row["loss"] for row in rows}),
        "seeds": len({row["seed"] for row in rows}),
        "audits": len(rows),
        "alarms": sum(not row["ok"] for row in rows),
        "median_s": median(seconds),
        "max_s": max(seconds),
    }


# --- all of it --------------------------------------------------------------------------------------------------------


def chosen(quick: bool, num_pairs: int) -> tuple[list[Case], int]:
    """Return the wrong losses to audit, and the number of those left out because a mistake has no effect."""
    rng = random.Random(0)
    cases = [case for signature in MADE for case in cases_of(signature)] + [example(m) for m in CATALOGUE]
    exact, means = ([case for case in cases if case.stochastic is wanted] for wanted in (False, True))
    if quick:
        exact, means = rng.sample(exact, QUICK_EXACT), rng.sample(means, QUICK_MEANS)
    else:
        pairs = [case for case in means if len(case.mistakes) > 1]
        means = [case for case in means if len(case.mistakes) == 1] + rng.sample(pairs, min(num_pairs, len(pairs)))
    kept = [case for case in (*exact, *means) if has_effect(case)]
    return kept, len(exact) + len(means) - len(kept)


def audit_right(quick: bool, minutes: float, seeds: int) -> tuple[list[Row], list[str]]:
    """Audit the right losses, seed after seed; a few of them where it has to be quick."""
    table, alarms = [], []
    for kind, stochastic in (("deterministic", False), ("stochastic", True)):
        losses = [loss for loss in CORRECT if loss.stochastic is stochastic]
        cases = [(seed, loss) for seed in range(5 if quick else seeds) for loss in losses]
        if quick:
            cases = random.Random(0).sample(cases, 1 if stochastic else QUICK_RIGHT)
        rows, wrong = rows_of_right(_shown(cases, f"right losses, {kind}"), minutes)
        table.append(summary_of_right(kind, rows))
        alarms += wrong
    return table, alarms


def _shown(items: Sequence[Any], what: str) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(items, what, console=console, disable=not console.is_terminal)


def report_unnamed(rows: Sequence[Row]) -> None:
    """Print every made loss that was not named exactly."""
    for row in sorted(rows, key=lambda row: (row["outcome"], row["kind"], row["made"])):
        if row["outcome"] not in NAMED:
            others = f" (or {'; or '.join(row['alternatives'])})" if row["alternatives"] else ""
            how = f"{row['signature']} [{row['form']}, {row['how']}]"
            print(f"{row['outcome']}: {how} {row['made']} -> {row['named']}{others}")


def main() -> int:
    """Check, audit, print; return the exit status."""
    parser = argument_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=STOCHASTIC_PAIRS, help="how many pairs with samples are made")
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds the right losses are audited with")
    parser.add_argument("--minutes", type=float, default=20.0, help="when to stop with right losses, of either kind")
    parser.add_argument("--only", choices=("made", "right"), help="one half alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    disagreements: list[str] = []
    if arguments.only != "right":
        disagreements += check(QUICK_CALLS if arguments.quick else NUM_CALLS)
        cases, without_effect = chosen(arguments.quick, arguments.pairs)
        rows = [row_of(case) for case in _shown(cases, "made mistakes")]
        show(f"Made mistakes ({without_effect} more have no effect)", summary(rows), COLUMNS)
        report_unnamed(rows)
        missed = [row for row in rows if row["outcome"] in MISSED]
        disagreements += [f"{row['outcome']}: {row['made']} in {row['signature']}" for row in missed]
    if arguments.only != "made":
        table, alarms = audit_right(arguments.quick, arguments.minutes, arguments.seeds)
        show("Right losses", table, RIGHT_COLUMNS)
        rows += table
        disagreements += alarms
    return finish(arguments.json, rows, disagreements)


if __name__ == "__main__":
    raise SystemExit(main())
