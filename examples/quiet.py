"""What Lightning says about every small run on the processor, left out of what the examples print."""

from __future__ import annotations

import logging
import warnings

_SAID = (
    ".*does not have many workers.*",  # the images are in memory
    ".*LeafSpec.*is deprecated.*",  # Lightning's own affair
)


def quiet(*expected: str) -> None:
    """Mute both Lightning packages below warnings, and the warnings that are expected.

    Args:
        expected: patterns of further warnings.
    """
    for pattern in (*_SAID, *expected):
        warnings.filterwarnings("ignore", pattern)
    for package in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        # they say it through a child, which has a level of its own where its package was imported first
        for name in (package, f"{package}.utilities.rank_zero"):
            logging.getLogger(name).setLevel(logging.WARNING)
