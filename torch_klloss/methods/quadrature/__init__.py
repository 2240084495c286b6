"""Quadrature in one dimension that certifies its error: where the nodes go, their sum, and what it is worth."""
