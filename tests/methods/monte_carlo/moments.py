"""What an estimator gives in expectation."""

from typing import NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """The expectation of an estimator's value, and of its gradients to the parameters of q and of p."""

    value: Tensor
    grad_q: Tensor
    grad_p: Tensor
