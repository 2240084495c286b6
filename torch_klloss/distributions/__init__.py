"""Properties of q and p as objects: constructors, checks, simplification, supports, tails, tensors."""

from torch_klloss.distributions.families import categorical, diagonal_normal, standard_normal_like
from torch_klloss.distributions.tails import Tail, declare_tails

__all__ = ["Tail", "categorical", "declare_tails", "diagonal_normal", "standard_normal_like"]


def __dir__() -> list[str]:
    return sorted(__all__)
