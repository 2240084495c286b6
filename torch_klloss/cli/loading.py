"""Losses from files and modules, as "file.py:function". The file is imported, which runs it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch_klloss.auditing.experiment.calling import described
from torch_klloss.auditing.experiment.containment import OutOfTimeError, without_forks

_NAME = "__audited__"  # like "__main__" for a script: a file called torch.py shadows nothing


class LoadError(ValueError):
    """Raised where a target cannot be loaded; its text says why."""


@contextlib.contextmanager
def loaded(target: str) -> Iterator[Callable[..., Any]]:
    """Import the file or module of a target, and give its function for the block.

    A file's directory comes first in `sys.path` for the block, as when Python runs the file. Its output during the
    import goes to stderr. A class is constructed without arguments: its instance is the loss, or has the method.

    Args:
        target: "path/to/file.py:function", "package.module:function", or either with "…:Class" or "…:Class.method".

    Raises:
        LoadError: if the file, module or function does not exist, or raises.

    Examples:
        >>> from torch_klloss.cli.loading import loaded
        >>> with loaded("torch.nn.functional:kl_div") as fn:
        ...     fn.__name__
        'kl_div'
    """
    source, separator, name = target.rpartition(":")
    if not separator or not source or not name:
        raise LoadError(f"expected path/to/file.py:function or package.module:function, got {target!r}")
    path = Path(source)
    is_file = path.suffix == ".py" or os.sep in source or _is_file(path)
    if is_file and not _is_file(path):
        raise LoadError(f"there is no file {source}")
    with _first_on_path(path.resolve().parent if is_file else Path.cwd()):
        try:
            with contextlib.redirect_stdout(sys.stderr), _load_errors_from(f"importing {source}"):
                module = _imported(source, path if is_file else None)
            with contextlib.redirect_stdout(sys.stderr), _load_errors_from(f"getting {name} of {source}"):
                fn = _found(module, name, source)
            yield fn
        finally:
            sys.modules.pop(_NAME, None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


@contextlib.contextmanager
def _first_on_path(directory: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path[:] = before


def _imported(source: str, path: Path | None) -> ModuleType:
    if path is None:
        return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location(_NAME, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{source} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module  # before it runs: dataclasses look there
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _load_errors_from(doing: str) -> Iterator[None]:
    try:
        with without_forks():
            yield
    except LoadError:
        raise
    except OutOfTimeError:
        raise
    except BaseException as error:  # the user's code may raise anything, and may exit
        raise LoadError(f"{doing} raises {described(error)}") from error


def _found(module: ModuleType, name: str, source: str) -> Callable[..., Any]:
    found: Any = module
    for part in name.split("."):
        if inspect.isclass(found) and _needs_an_instance(found, part):
            found = _constructed(found)
        if not hasattr(found, part):
            raise LoadError(f"{source} has no {name!r}{_contents(module)}")
        found = getattr(found, part)
    if inspect.isclass(found):
        found = _constructed(found)
    if not callable(found):
        raise LoadError(f"{name!r} of {source} is no function: it is of the type {type(found).__name__}")
    loss: Callable[..., Any] = found
    return loss


def _needs_an_instance(cls: type, name: str) -> bool:
    """Return whether `name` is a method, or made by the constructor; static and class methods need no instance."""
    attribute = inspect.getattr_static(cls, name, None)
    return attribute is None or inspect.isfunction(attribute) or isinstance(attribute, property)


def _constructed(cls: type) -> Any:
    with _load_errors_from(f"constructing {cls.__name__}() without arguments"):
        return cls()


def _contents(module: ModuleType) -> str:
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    names = sorted(name for name in own if not name.startswith("_"))
    return f"; it has {', '.join(names[:10])}{', …' if len(names) > 10 else ''}" if names else ""
