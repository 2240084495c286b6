"""Arithmetic that knows its rounding. Nothing here knows a distribution."""
