"""One callback class for both Lightning packages."""

from __future__ import annotations

import importlib
from typing import Any


def _callback_bases() -> tuple[type, ...]:
    """Return the `Callback` class of every Lightning package there is.

    The two packages have classes of the same name that know nothing of each other; a callback that derives from both
    is at home in the Trainer and the command line of either.
    """
    bases = []
    for package in ("pytorch_lightning", "lightning.pytorch"):
        try:
            bases.append(importlib.import_module(package).Callback)
        except ModuleNotFoundError:
            continue
    if not bases:
        raise ImportError(
            "torch_klloss.callbacks needs Lightning, which is not installed: pip install 'torch_klloss[lightning]' "
            "(pytorch-lightning), or pip install lightning."
        )
    return tuple(dict.fromkeys(bases))


Callback: Any = type("Callback", _callback_bases(), {"__doc__": "Base of the callbacks, for every Lightning package."})
