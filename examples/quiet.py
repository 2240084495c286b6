"""Suppression of the warnings that Lightning gives for every small run on the CPU."""

from __future__ import annotations

import logging
import warnings

_EXPECTED = (
    ".*does not have many workers.*",  # the images are in memory
    ".*LeafSpec.*is deprecated.*",  # inside Lightning
)


def quiet(*expected: str) -> None:
    """Silence both Lightning packages below warnings, and the warnings that are expected.

    Args:
        expected: patterns of further warnings.
    """
    for pattern in (*_EXPECTED, *expected):
        warnings.filterwarnings("ignore", pattern)
    for package in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        # the child that logs has its own level if its package was imported first
        for name in (package, f"{package}.utilities.rank_zero"):
            logging.getLogger(name).setLevel(logging.WARNING)
