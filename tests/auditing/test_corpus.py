"""The corpus is what it says: each of its losses is measured against torch's exact KL in float64.

A deterministic loss is called once, one that draws `CALLS` times on a batch that repeats its examples `COPIES` times.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from tests.auditing.correct_losses import CORRECT
from tests.auditing.losses import Loss
from tests.auditing.wrong_losses import BROKEN, WRONG

CALLS, COPIES = 24, 125  # six standard errors, of 23 degrees of freedom, are passed by chance once in 250,000
SEEDS = (0, 1, 2)
ROUNDING = 1e-12  # thousands of float64 ULP: sums of some dozen terms, and what exp and log add
CLEAR = 1e-3  # a mistake that moves the number by less would be none

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # that is their mistake


class Pair(NamedTuple):
    """One evaluation: what `fn` is given, and the q and p that it stands for (not peeled)."""

    arguments: tuple[Any, ...]
    q: Distribution
    p: Distribution

    @property
    def kl(self) -> Tensor:
        """KL(q‖p) of every example."""
        kl = kl_divergence(self.q, self.p)
        return kl.flatten(1).sum(1) if kl.dim() > 1 else kl


class Parameters(NamedTuple):
    """Leaves that gradients are taken with respect to."""

    q: tuple[Tensor, ...]
    p: tuple[Tensor, ...]


def seed_draws(seed: int) -> None:
    """Seed the CPU alone: `torch.manual_seed` formats a stack for every kind of device, which takes longer."""
    torch.default_generator.manual_seed(seed)


def uniform(shape: tuple[int, ...], half_width: float) -> Tensor:
    return half_width * (2 * torch.rand(shape, dtype=torch.float64) - 1)


def draw_parameters(loss: Loss) -> Parameters:
    """Draw ordinary parameters, with KLs of order 1.

    Of two Normals q is wider, by 1.17 to 1.38 in the variance: the two directions differ, and both ratios of the
    densities have a variance. Against a standard Normal q is narrower, so that no term averages out over the batch.
    """

    def leaves(log_scale: float) -> tuple[Tensor, ...]:
        if loss.takes in ("logits", "kl_div") or loss.family in ("categorical", "bernoulli"):
            return (uniform(loss.shape, 1.5),)
        if has_fixed_prior(loss):
            return uniform(loss.shape, 1.2), uniform(loss.shape, 0.6) - 0.6  # mean, log-variance
        if loss.family == "multivariate":
            return uniform(loss.shape, 0.8), uniform((*loss.shape, loss.shape[-1]), 0.02) + log_scale
        return uniform(loss.shape, 0.8), uniform(loss.shape, 0.02) + log_scale

    q, p = leaves(0.08), () if has_fixed_prior(loss) else leaves(-0.04)
    if loss.inputs == "extreme":  # in float32, where these underflow; the KL is finite
        q = (q[0], q[1] - 200) if has_fixed_prior(loss) else (100 * q[0],)
        p = tuple(100 * each for each in p)
    return Parameters(*(tuple(leaf.requires_grad_() for leaf in side) for side in (q, p)))


def has_fixed_prior(loss: Loss) -> bool:
    return loss.takes in ("mean_logvar", "mean_std", "mean_logstd", "samples")


def build(loss: Loss, parameters: Parameters, copies: int) -> Pair:
    """Build the arguments of `loss` from leaves, with draws of their own where it takes draws."""
    q, p = (tuple(leaf.repeat(copies, *(1,) * (leaf.dim() - 1)) for leaf in side) for side in parameters)
    if loss.takes in ("logits", "kl_div"):
        arguments = (q[0], p[0]) if loss.takes == "logits" else (p[0].log_softmax(-1), q[0].softmax(-1))
        return Pair(arguments, Categorical(logits=q[0]), Categorical(logits=p[0]))
    if loss.takes == "distributions":
        kind = {"categorical": categorical, "bernoulli": bernoulli, "multivariate": multivariate}.get(
            loss.family, normal
        )
        pair = kind(*q), kind(*p)
        arguments = tuple(Independent(each, 1) for each in pair) if loss.family == "independent" else pair
        return Pair(arguments, *pair)
    if loss.takes == "log_probs":
        pair = normal(*q), normal(*p)
        x = pair[0].rsample(() if loss.num_samples is None else (loss.num_samples,))
        x = x if loss.draws == "pathwise" else x.detach()
        return Pair(tuple(each.log_prob(x).sum(-1) for each in pair), *pair)
    mean, logvar = q
    pair = normal(mean, logvar / 2), Normal(torch.zeros_like(mean), torch.ones_like(mean))
    if loss.takes == "samples":
        return Pair((pair[0].rsample(), mean, logvar), *pair)
    second = {"mean_logvar": logvar, "mean_std": (logvar / 2).exp(), "mean_logstd": logvar / 2}[loss.takes]
    return Pair((mean, second), *pair)


def normal(loc: Tensor, log_scale: Tensor) -> Distribution:
    return Normal(loc, log_scale.exp())


def categorical(logits: Tensor) -> Distribution:
    return Categorical(logits=logits)


def bernoulli(logits: Tensor) -> Distribution:
    return Bernoulli(logits=logits)


def multivariate(loc: Tensor, raw: Tensor) -> Distribution:
    return MultivariateNormal(loc, scale_tril=raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp()))


class Result(NamedTuple):
    """A value `[n]` and its gradients `[k]` by the leaves of q and of p; of several calls, stacked."""

    value: Tensor
    by_q: Tensor
    by_p: Tensor


class Measured(NamedTuple):
    """What the calls of a loss gave, and what a correct one gives under each reduction that its output may have."""

    calls: Result
    exact: dict[str, Result]


@cache
def measure(loss: Loss, seed: int) -> Measured:
    seed_draws(seed)
    parameters = draw_parameters(loss)
    calls, copies = (CALLS, COPIES) if loss.stochastic else (1, 1)
    results = []
    for _ in range(calls):
        pair = build(loss, parameters, copies)
        output = torch.as_tensor(loss.fn(*given(loss, pair)), dtype=torch.float64)
        results.append(result(output, parameters, copies))
    exact = {name: result(kl, parameters, copies) for name, kl in expectations(output, pair.kl).items()}
    return Measured(Result(*(torch.stack(each) for each in zip(*results, strict=True))), exact)


def pair_of(loss: Loss, seed: int) -> Pair:
    """Return the q and p of `measure`, each example once."""
    seed_draws(seed)
    return build(loss, draw_parameters(loss), 1)


def given(loss: Loss, pair: Pair) -> tuple[Any, ...]:
    if loss.inputs == "ordinary":
        return pair.arguments
    return tuple(each.float() for each in pair.arguments)


def expectations(output: Tensor, kl: Tensor) -> dict[str, Tensor]:
    """Return what `output` could be: a number is the mean or the sum, `[batch, ...]` one KL a row, others nothing."""
    if output.dim() == 0:
        return {"mean": kl.mean(), "sum": kl.sum()}
    if output.shape[0] != kl.shape[0]:
        return {}
    return {"per_example" if output.dim() == 1 else "per_element": kl}


def result(output: Tensor, parameters: Parameters, copies: int) -> Result:
    """Add terms up over an example, average over its copies, and differentiate.

    The gradient is that of a weighted sum, so that one example cannot stand in for another.
    """
    value = output.flatten(1).sum(1) if output.dim() > 1 else output.reshape(-1)
    leaves = (*parameters.q, *parameters.p)
    grads = [torch.zeros_like(leaf) for leaf in leaves]
    if value.requires_grad:
        weights = torch.linspace(0.5, 1.5, len(value), dtype=value.dtype)
        grads = torch.autograd.grad((weights * value).sum(), leaves, retain_graph=True, materialize_grads=True)
    flat, split = [grad.flatten() for grad in grads], len(parameters.q)
    value = value.detach()
    value = value if output.dim() == 0 else value.reshape(copies, -1).mean(0)
    return Result(value, torch.cat(flat[:split]), torch.cat([*flat[split:], value.new_zeros(0)]))


def gap_and_spread(samples: Tensor, exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return |mean - exact| of calls `[calls, n]`, six standard errors of that mean, and the size of `exact`."""
    if not len(exact):
        return exact, exact, exact
    several = len(samples) > 1
    std_error = samples.std(0) / math.sqrt(len(samples)) if several else torch.zeros_like(exact)
    return (samples.mean(0) - exact).abs(), 6 * std_error, exact.abs().max()


def agrees(samples: Tensor, exact: Tensor, tolerance: float) -> bool:
    gap, spread, size = gap_and_spread(samples, exact)
    return bool((gap <= spread + (ROUNDING + tolerance) * (1 + size)).all())


def differs(samples: Tensor, exact: Tensor) -> bool:
    gap, spread, size = gap_and_spread(samples, exact)
    return not bool((gap <= spread + CLEAR * size).all())


def seeds(loss: Loss) -> tuple[int, ...]:
    return SEEDS[:2] if loss.stochastic else SEEDS  # many calls each


def sides(loss: Loss) -> set[str]:
    """Return the sides that `loss` means to give a gradient to."""
    return {"both": {"by_q", "by_p"}, "q only": {"by_q"}, "p only": {"by_p"}, "value only": set()}[loss.gradient]


def has_right_value(loss: Loss, measured: Measured) -> bool:
    exact = measured.exact.get(loss.reduction)
    return exact is not None and agrees(measured.calls.value, exact.value, loss.tolerance)


def has_right_gradient(loss: Loss, measured: Measured) -> bool:
    calls, exact = measured.calls, measured.exact.get(loss.reduction)
    return (
        exact is not None
        and all(agrees(getattr(calls, side), getattr(exact, side), loss.tolerance) for side in sides(loss))
        and not any(getattr(calls, side).any() for side in {"by_q", "by_p"} - sides(loss))
    )


def has_wrong_value(measured: Measured) -> bool:
    """Tell that the value is not that of a correct loss, whatever the reduction."""
    return all(differs(measured.calls.value, exact.value) for exact in measured.exact.values())


def has_wrong_gradient(loss: Loss, measured: Measured) -> bool:
    """Tell that a gradient which `loss` means to give is not that of a correct one, whatever the reduction."""
    return all(
        any(differs(getattr(measured.calls, side), getattr(exact, side)) for side in sides(loss))
        for exact in measured.exact.values()
    )


def entries(corpus: tuple[Loss, ...]) -> pytest.MarkDecorator:
    """Run a test for every loss with one seed in every run, and with the others in `make test-all`."""
    cases = [
        pytest.param(loss, seed, id=f"{loss.name}-{seed}", marks=pytest.mark.exhaustive if seed else ())
        for loss in corpus
        for seed in seeds(loss)
    ]
    return pytest.mark.parametrize(("loss", "seed"), cases)


@entries(CORRECT)
def test_a_correct_loss_has_the_exact_value_and_gradient_and_half_as_much_again_has_not(loss, seed):
    measured = measure(loss, seed)
    assert has_right_value(loss, measured)
    assert has_right_gradient(loss, measured)
    twin = Measured(Result(*(1.5 * each for each in measured.calls)), measured.exact)
    assert not has_right_value(loss, twin)
    assert has_wrong_value(twin)
    assert has_wrong_gradient(loss, twin) or not sides(loss)
    assert not (has_right_gradient(loss, twin) and sides(loss))


@entries(WRONG)
def test_a_wrong_loss_is_wrong_as_it_says(loss, seed):
    measured = measure(loss, seed)
    assert has_wrong_value(measured) if loss.value_wrong else has_right_value(loss, measured)
    assert has_wrong_gradient(loss, measured) if loss.gradient_wrong else has_right_gradient(loss, measured)


@entries(tuple(loss for loss in WRONG if loss.expectation is not None))
def test_a_wrong_loss_returns_what_it_is_said_to_return(loss, seed):
    measured, pair = measure(loss, seed), pair_of(loss, seed)
    expected = loss.expectation(pair.q, pair.p).detach().reshape(-1)
    assert agrees(measured.calls.value, expected, loss.tolerance)
    assert differs(1.5 * measured.calls.value + 0.1, expected)


EXTREME = [loss for loss in WRONG if loss.inputs == "extreme"]


@pytest.mark.parametrize("loss", EXTREME, ids=lambda loss: loss.name)
def test_what_is_wrong_at_extremes_alone_is_right_elsewhere_and_others_are_right_there(loss):
    ordinary = replace(loss, inputs="ordinary", tolerance=1e-6)
    assert has_right_value(ordinary, measure(ordinary, 0))
    robust = {"logits": "log_softmax_difference", "mean_logvar": "sum_and_mean_by_dimension"}[loss.takes]
    (twin,) = (each for each in CORRECT if each.name == robust)
    extreme = replace(twin, inputs="extreme", tolerance=1e-5)  # in float32
    assert has_right_value(extreme, measure(extreme, 0))


# What is broken.


def plain_arguments(loss: Loss) -> tuple[Any, ...]:
    """Return arguments that are no leaves, so that they could be changed in place."""
    torch.manual_seed(0)
    return build(loss, draw_parameters(loss), 1).arguments


def is_instance(kind: type) -> Callable[[Loss], bool]:
    return lambda loss: isinstance(loss.fn(*plain_arguments(loss)), kind)


def raises(loss: Loss) -> bool:
    try:
        loss.fn(*plain_arguments(loss))
    except (RuntimeError, TypeError, AttributeError, IndexError):
        return True
    return False


def changes_inputs(loss: Loss) -> bool:
    arguments = plain_arguments(loss)
    before = [each.clone() for each in arguments]
    loss.fn(*arguments)
    return not all(torch.equal(*each) for each in zip(arguments, before, strict=True))


def state_after(loss: Loss, seed: int) -> tuple[Tensor, Tensor]:
    arguments = plain_arguments(loss)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    loss.fn(*arguments)
    return before, torch.get_rng_state()


def moves_the_stream(loss: Loss) -> bool:
    before, after = state_after(loss, 1)
    return not torch.equal(before, after) and torch.equal(
        loss.fn(*plain_arguments(loss)), loss.fn(*plain_arguments(loss))
    )


def resets_the_stream(loss: Loss) -> bool:
    return torch.equal(state_after(loss, 1)[1], state_after(loss, 2)[1])


def remembers(loss: Loss) -> bool:
    arguments = plain_arguments(loss)
    return not torch.equal(loss.fn(*arguments), loss.fn(*arguments))


def switches_gradients_off(loss: Loss) -> bool:
    arguments = plain_arguments(loss)
    try:
        loss.fn(*arguments)
        return not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def changes_the_default_dtype(loss: Loss) -> bool:
    arguments, before = plain_arguments(loss), torch.get_default_dtype()
    try:
        loss.fn(*arguments)
        return torch.get_default_dtype() != before
    finally:
        torch.set_default_dtype(before)


def accumulates_gradients(loss: Loss) -> bool:
    arguments = tuple(each.detach().requires_grad_() for each in plain_arguments(loss))
    loss.fn(*arguments)
    return all(each.grad is not None for each in arguments)


BREAKS: dict[str, Callable[[Loss], bool]] = {
    "raises": raises,
    "returns-none": is_instance(type(None)),
    "returns-int": is_instance(int),
    "returns-integer-tensor": lambda loss: not loss.fn(*plain_arguments(loss)).is_floating_point(),
    "returns-complex": lambda loss: loss.fn(*plain_arguments(loss)).is_complex(),
    "returns-numpy": is_instance(np.ndarray),
    "returns-list": is_instance(list),
    "returns-tuple": is_instance(tuple),
    "returns-dict": is_instance(dict),
    "returns-string": is_instance(str),
    "returns-nan": lambda loss: bool(loss.fn(*plain_arguments(loss)).isnan().all()),
    "returns-empty": lambda loss: loss.fn(*plain_arguments(loss)).numel() == 0,
    "changes-inputs": changes_inputs,
    "consumes-global-rng": moves_the_stream,
    "reseeds-global-rng": resets_the_stream,
    "stateful": remembers,
    "switches-gradients-off": switches_gradients_off,
    "changes-default-dtype": changes_the_default_dtype,
    "calls-backward": accumulates_gradients,
}


@pytest.mark.parametrize("loss", BROKEN, ids=lambda loss: loss.name)
def test_a_broken_loss_is_broken_as_it_says(loss):
    assert loss.mistakes
    assert all(BREAKS[mistake](loss) for mistake in loss.mistakes)


@pytest.mark.parametrize("kind", BREAKS)
def test_no_correct_loss_passes_for_a_broken_one(kind):
    (twin,) = (each for each in CORRECT if each.name == "sum_and_mean_by_dimension")
    assert not BREAKS[kind](twin)


# The corpus as a whole.


def test_names_are_unique_and_mistakes_are_named():
    names = [loss.name for loss in (*CORRECT, *WRONG, *BROKEN)]
    assert len(names) == len(set(names))
    assert not any(loss.mistakes for loss in CORRECT)
    assert all(loss.mistakes and (loss.value_wrong or loss.gradient_wrong) for loss in WRONG)


def test_every_signature_is_there_right_and_wrong_and_to_be_found_out():
    signatures = {loss.takes for loss in CORRECT}
    assert signatures == {loss.takes for loss in WRONG} == {loss.takes for loss in CORRECT if loss.signature is None}
    assert all(loss.signature in (loss.takes, None) for loss in (*CORRECT, *WRONG, *BROKEN))
