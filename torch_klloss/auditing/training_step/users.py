"""torch_klloss/auditing/training_step/users.py."""

from __future__ import annotations

import os
import site
import sysconfig
from pathlib import Path
from types import CodeType, FrameType

from torch import nn

_FRAMEWORKS = frozenset(
    ["torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "numpy"]
)
_OURS = f"{Path(__file__).parents[2]}{os.sep}"
_LIBRARIES = (
    *(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    *(f"{path}{os.sep}" for path in site.getsitepackages()),
    "<frozen",
)


class UsersFunctions:
    """Tell the user's functions: those outside of all libraries, and of the packages that the module comes from."""

    def __init__(self, module: nn.Module) -> None:
        self._packages = _packages_of(module)
        self._known: dict[CodeType, bool] = {}

    def has(self, frame: FrameType) -> bool:
        """Return whether it is one of them that runs there."""
        code = frame.f_code
        if code not in self._known:
            package = str(frame.f_globals.get("__name__", "")).split(".")[0]
            is_own = package in self._packages or not _is_library(code.co_filename)
            is_theirs = package in _FRAMEWORKS or code.co_filename.startswith(_OURS)
            self._known[code] = _is_written(code) and is_own and not is_theirs
        return self._known[code]

    def caller(self, frame: FrameType) -> FrameType | None:
        """Return the nearest caller that is one of them."""
        back = frame.f_back
        while back is not None and not self.has(back):
            back = back.f_back
        return back


def _is_written(code: CodeType) -> bool:
    """Return whether a function has a name, or is a lambda, and was not generated, as those of a record are."""
    if code.co_filename == "<string>" and code.co_name in ("<lambda>", "__init__", "__new__"):
        return False
    return not code.co_name.startswith("<") or code.co_name == "<lambda>"


def _is_library(file: str) -> bool:
    return file.startswith(_LIBRARIES) or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _packages_of(module: nn.Module) -> frozenset[str]:
    """Return the packages that the module's own classes come from: a model may be installed, too."""
    classes = {cls for m in module.modules() for cls in type(m).__mro__}
    packages = frozenset(cls.__module__.split(".")[0] for cls in classes)
    return packages - _FRAMEWORKS - {"torch_klloss", "builtins", "abc", "typing"}
