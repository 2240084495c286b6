"""Property tests for a KL of your own: `check_kl(q, p)`."""

from torch_klloss.testing.laws import KLReport, check_kl

__all__ = ["KLReport", "check_kl"]
