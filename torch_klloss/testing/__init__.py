"""Property tests for your own KL: `check_kl(q, p)`."""

from torch_klloss.testing.laws import KLReport, check_kl

__all__ = ["KLReport", "check_kl"]
