"""The entries of a corpus of KL losses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor
from torch.distributions import Distribution

SignatureName = Literal[
    "distributions",  # fn(q, p)
    "mean_logvar",  # fn(mean, log σ²), against a standard Normal; so are the next two
    "mean_std",  # fn(mean, σ)
    "mean_logstd",  # fn(mean, log σ)
    "log_probs",  # fn(log q, log p), summed over the event, `[S, batch]` or `[batch]`, at draws of q
    "samples",  # fn(z, mean, log σ²): z a reparameterised draw, against a standard Normal
    "logits",  # fn(logits of q, logits of p), `[batch, classes]`
    "kl_div",  # fn(log-probabilities of p, probabilities of q), the order of F.kl_div
]
Family = Literal["normal", "independent", "multivariate", "categorical", "bernoulli"]
Reduction = Literal["mean", "sum", "per_example", "per_element"]
GivenGradients = Literal["both", "q only", "p only", "value only"]
Draws = Literal["pathwise", "detached"]
Inputs = Literal["ordinary", "extreme"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Loss:
    """A KL loss as somebody might have written it, and what is true of it.

    Args:
        name: unique in its corpus.
        fn: the loss.
        signature: the signature that an audit is given; None where it has to find it out.
        takes: what `fn` takes.
        family: for "distributions": Normal `[batch, latent]`, the same within `Independent`, MultivariateNormal
            `[batch]`, Categorical `[batch]`, or Bernoulli `[batch, latent]`.
        shape: of the parameters, the batch first: one that `fn` accepts.
        draws: for "log_probs": whether the samples have a gradient of their own (`rsample`) or none (`sample`).
        num_samples: for "log_probs": S, or None for one draw an example without a dimension of its own.
        stochastic: whether two calls with the same parameters differ, through draws of `fn` or of its arguments.
        reduction: what `fn` returns, or means to: the mean or the sum of the per-example KLs, these themselves
            `[batch]`, or terms `[batch, ...]` that add up to them.
        gradient: which gradients `fn` gives, or means to; the others are zero.
        tolerance: the error, in nats an example, of the way in which `fn` computes, at ordinary parameters in float64;
            its gradient has the same one.
        mistakes: what is wrong, in short plain words.
        value_wrong: whether the value, in expectation, is neither the mean nor the sum of the KLs.
        gradient_wrong: whether one of the gradients that `fn` means to give is not that of its KL.
        inputs: where it is wrong: at any parameters, or at extreme ones alone.
        expectation: what `fn` returns in expectation, where that is a known quantity of q and p (not peeled).
        note: what one should know besides.
    """

    name: str
    fn: Callable[..., Any]
    signature: SignatureName | None
    takes: SignatureName
    family: Family = "independent"
    shape: tuple[int, ...] = (5, 3)
    draws: Draws = "pathwise"
    num_samples: int | None = 4
    stochastic: bool = False
    reduction: Reduction = "mean"
    gradient: GivenGradients = "both"
    tolerance: float = 0.0
    mistakes: frozenset[str] = frozenset()
    value_wrong: bool = False
    gradient_wrong: bool = False
    inputs: Inputs = "ordinary"
    expectation: Callable[[Distribution, Distribution], Tensor] | None = None
    note: str = ""


def entry(
    corpus: list[Loss],
    takes: SignatureName,
    *mistakes: str,
    name: str | None = None,
    stated: bool = True,
    value_wrong: bool | None = None,
    gradient_wrong: bool | None = None,
    **facts: Any,
) -> Callable[[F], F]:
    """Return a decorator that adds a function to the corpus and leaves it as it is.

    A loss with mistakes is wrong in value and gradient unless it is said otherwise.
    """

    def add(fn: F) -> F:
        corpus.append(
            Loss(
                name=name or fn.__name__,
                fn=fn,
                signature=takes if stated else None,
                takes=takes,
                mistakes=frozenset(mistakes),
                value_wrong=bool(mistakes) if value_wrong is None else value_wrong,
                gradient_wrong=bool(mistakes) if gradient_wrong is None else gradient_wrong,
                **facts,
            )
        )
        return fn

    return add
