"""Property tests for your own KL: `check_kl(q, p)`."""

from torch_klloss.testing.laws import KLReport, check_kl

__all__ = ["KLReport", "check_kl"]


def __dir__() -> list[str]:
    return sorted(__all__)
