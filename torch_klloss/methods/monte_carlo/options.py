"""The options of `MonteCarlo` and their invalid combinations."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch.distributions import Distribution

from torch_klloss.distributions.checks import type_name
from torch_klloss.distributions.simplify import diagonal_normal_of
from torch_klloss.distributions.tensors import unvalidated
from torch_klloss.numerics.tracing import is_forward_mode, is_func_transformed
from torch_klloss.samplers.components import mixture_of

Gradient = Literal["auto", "pathwise", "sticking_the_landing", "mixed", "score_function", "none"]
Value = Literal["log_ratio", "entropy", "control_variate", "taylor", "k2", "k3"]

SURROGATES = ("control_variate", "taylor")
HELD_OUT = 8  # the fewest draws of which one half fits coefficients for the other


def check_options(gradient: str, value: str, num_samples: int, chunk_size: int | None, remembers: bool) -> None:
    """Raise a ValueError for an unknown word, or an invalid combination."""
    for option, given, known in (("gradient", gradient, get_args(Gradient)), ("value", value, get_args(Value))):
        if given not in known:
            raise ValueError(f"{option} must be one of {', '.join(map(repr, known))}, got {given!r}.")
    if value == "control_variate" and num_samples % 2:
        raise ValueError(
            f"value='control_variate' fits one half of the draws and corrects the other: num_samples must be even, got "
            f"{num_samples}."
        )
    reason = _CLASHES.get((value, gradient))
    if reason is not None:
        raise ValueError(f"value={value!r} and gradient={gradient!r} cannot be combined: {reason}")
    if gradient == "mixed" and num_samples < (2 if remembers else HELD_OUT):
        raise ValueError(
            f"gradient='mixed' needs num_samples of at least {HELD_OUT} to fit its coefficients on half of them, or "
            f"of 2 with gradient=MixedGradient(), which keeps them from earlier steps; got {num_samples}."
        )
    if gradient == "mixed" and chunk_size is not None:
        raise ValueError("gradient='mixed' needs the gradient of all draws at once: use chunk_size=None.")


def refuse_value(value: str, q: Distribution) -> None:
    """Raise a NotImplementedError if q lacks what the form of the value needs."""
    if value in SURROGATES and diagonal_normal_of(q) is None:
        raise NotImplementedError(
            f"MonteCarlo(value={value!r}) needs a q that is a Normal with independent coordinates, got {type_name(q)}; "
            "use value='log_ratio'."
        )
    if value == "entropy" and not _has_entropy(q):
        raise NotImplementedError(
            f"MonteCarlo(value='entropy') needs q.entropy(), which {type_name(q)} lacks; use value='log_ratio'."
        )


def refuse_transforms(gradient: str, value: str) -> None:
    """Raise a NotImplementedError under `torch.func` or in forward mode if the estimator itself takes derivatives."""
    if gradient != "mixed" and value not in SURROGATES:
        return
    if is_func_transformed() or is_forward_mode():
        raise NotImplementedError(
            f"MonteCarlo(value={value!r}, gradient={gradient!r}) takes derivatives of its own, which works neither "
            "under torch.func (vmap, grad, ...) nor in forward mode; use value='log_ratio' with gradient='pathwise'."
        )


def _has_entropy(q: Distribution) -> bool:
    if mixture_of(q) is not None:
        return False
    try:
        with torch.no_grad():
            unvalidated(q).entropy()  # of a copy, or q keeps what torch computes on first use
    except NotImplementedError:
        return False
    return True


_NO_SCORE = "log q is integrated exactly, so that there is no score term to remove; use gradient='pathwise'."
_NO_PATH = "the quadratic is a function of reparameterised points; use gradient='pathwise', or value='log_ratio'."
_OWN = "the mixed gradient is for the mean of log q - log p; use value='log_ratio'."

# Keyed by value and gradient.
_CLASHES: dict[tuple[str, str], str] = {
    ("entropy", "sticking_the_landing"): _NO_SCORE,
    ("entropy", "mixed"): _NO_SCORE,
    **{(value, "sticking_the_landing"): _NO_SCORE for value in SURROGATES},
    **{(value, "mixed"): _NO_SCORE for value in SURROGATES},
    **{(value, "score_function"): _NO_PATH for value in SURROGATES},
    **{(value, "mixed"): _OWN for value in ("k2", "k3")},
}
