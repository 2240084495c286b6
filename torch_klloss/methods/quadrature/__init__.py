"""Quadrature in one dimension that certifies its error."""

from torch_klloss.methods.quadrature.method import Quadrature

__all__ = ["Quadrature"]
