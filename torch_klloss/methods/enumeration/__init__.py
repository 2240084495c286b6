"""Exact sums over the support of a discrete q."""

from torch_klloss.methods.enumeration.method import Enumeration

__all__ = ["Enumeration"]
