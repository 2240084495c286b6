"""Explanations of what a loss returns: the catalogue of mistakes, and the fit that names them."""
