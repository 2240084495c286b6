"""The watcher of a training step: what its functions hold when they return, and what they log."""

from __future__ import annotations

import contextlib
import inspect
import os
import site
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution
from torch.distributions.kl import kl_divergence as _torch_kl_divergence

from torch_klloss.auditing.experiment.names import words_of
from torch_klloss.auditing.training_step.names import is_kl_name
from torch_klloss.auditing.training_step.record import (
    FunctionRecord,
    LossCall,
    NamedValue,
    Number,
    line_of,
    location,
    owner_name,
    values_of,
)
from torch_klloss.closed_forms import kl_divergence
from torch_klloss.losses import Call, KLLoss

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
    """The user's functions: those outside of all libraries, and those of the packages that the module comes from."""

    def __init__(self, module: nn.Module) -> None:
        self._packages = _packages_of(module)
        self._known: dict[CodeType, bool] = {}

    def has(self, frame: FrameType) -> bool:
        """Return whether a frame is of one of them."""
        code = frame.f_code
        if code not in self._known:
            package = str(frame.f_globals.get("__name__", "")).split(".")[0]
            is_own = package in self._packages or not _is_library(code.co_filename)
            is_theirs = package in _FRAMEWORKS or code.co_filename.startswith(_OURS)
            self._known[code] = _is_written(code) and is_own and not is_theirs
        return self._known[code]

    def caller(self, frame: FrameType) -> FrameType | None:
        """Return the nearest caller among them."""
        back = frame.f_back
        while back is not None and not self.has(back):
            back = back.f_back
        return back


def _is_written(code: CodeType) -> bool:
    """Return whether a function was written by someone, and not generated, as a dataclass's methods are."""
    if code.co_filename == "<string>" and code.co_name in ("<lambda>", "__init__", "__new__"):
        return False
    return not code.co_name.startswith("<") or code.co_name == "<lambda>"


def _is_library(file: str) -> bool:
    return file.startswith(_LIBRARIES) or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _packages_of(module: nn.Module) -> frozenset[str]:
    """Return the packages of the module's own classes: a model may be installed, too."""
    classes = {cls for m in module.modules() for cls in type(m).__mro__}
    packages = frozenset(cls.__module__.split(".")[0] for cls in classes)
    return packages - _FRAMEWORKS - {"torch_klloss", "builtins", "abc", "typing"}


_KL_FUNCTIONS = {_torch_kl_divergence.__code__, kl_divergence.__code__}
_KL_DIV = nn.functional.kl_div.__code__


class Watcher:
    """Records the user's functions as they return, by `sys.setprofile`, and what they log."""

    def __init__(self, module: nn.Module, named: Iterable[str] = ()) -> None:
        self.records: list[FunctionRecord] = []
        self.numbers: list[Number] = []
        self.logged: list[tuple[FrameType, int, str, Any]] = []
        self.loss_calls: list[LossCall] = []
        self.returned: Any = None
        self.error: BaseException | None = None
        self._module = module
        self._named = {words_of(name) for name in named}
        self._users = UsersFunctions(module)
        self._before = {id(t) for m in module.modules() for t in vars(m).values() if isinstance(t, Tensor)}
        self._called: dict[int, list[tuple[Distribution, Distribution]]] = {}
        self._points: dict[int, list[Tensor]] = {}
        self._counts: dict[CodeType, int] = {}
        self._paths: dict[KLLoss, str] = {}

    def run(self, batch: Any, batch_idx: int) -> None:
        """Run the step and record it."""
        self._paths = {m: path for path, m in self._module.named_modules() if isinstance(m, KLLoss)}
        for loss in self._paths:
            loss.add_observer(self)
        module: Any = self._module
        takes = _num_arguments(module.training_step)
        before = sys.getprofile()
        with _logging_to(self._module, self._log), _eager():
            sys.setprofile(self._look)
            try:
                self.returned = module.training_step(*(batch, batch_idx)[:takes])
            except Exception as error:
                self.error = error
            finally:
                sys.setprofile(before)
                for loss in self._paths:
                    loss.remove_observer(self)
        self._take_logged()

    def is_kl(self, name: str) -> bool:
        """Return whether a name suggests a KL, or is the name of a given pair."""
        return is_kl_name(name) or words_of(name) in self._named

    def _look(self, frame: FrameType, event: str, returned: Any) -> None:
        if event != "return":
            return
        with contextlib.suppress(Exception):  # an error here would leave the user's step
            if self._users.has(frame):
                self._take(frame, returned)
                return
            caller = self._users.caller(frame) if frame.f_code is _KL_DIV else frame.f_back
            if caller is not None and self._users.has(caller):
                self._take_call(frame, caller, returned)

    def _take_call(self, frame: FrameType, caller: FrameType, returned: Any) -> None:
        code = frame.f_code
        if code is _KL_DIV:
            self._called.setdefault(id(caller), []).append(_pair_of_kl_div(frame.f_locals))
        elif code in _KL_FUNCTIONS:
            first, second = (frame.f_locals[name] for name in code.co_varnames[:2])
            self._called.setdefault(id(caller), []).append((first, second))
        elif code.co_name in ("log_prob", "rsample", "sample") and isinstance(frame.f_locals.get("self"), Distribution):
            point = frame.f_locals.get("value", returned)
            if isinstance(point, Tensor):
                self._points.setdefault(id(caller), []).append(point)

    def _take(self, frame: FrameType, returned: Any) -> None:
        code = frame.f_code
        nth = self._counts[code] = self._counts.get(code, -1) + 1
        num = code.co_argcount + code.co_kwonlyargcount
        record = FunctionRecord(
            frame,
            nth,
            self._users.caller(frame),
            list(values_of(frame)),
            frozenset(code.co_varnames[:num]),
            returned,
            frame.f_lineno,
            self._called.pop(id(frame), []),
            self._points.pop(id(frame), []),
        )
        self.records.append(record)
        for value in record.values:
            if self.is_kl(value.role) and id(value.value) not in self._before:
                self._add(record, value, own=value.label not in record.parameters)
        owner = frame.f_locals.get(owner_name(code))
        function = f"{type(owner).__name__}_" if code.co_name == "forward" else ""
        is_step = code is getattr(getattr(type(self._module), "training_step", None), "__code__", None)
        if isinstance(returned, Tensor) and not is_step and self.is_kl(f"{function}{code.co_name}"):
            self._add(record, NamedValue("the returned value", code.co_name, returned), own=True)

    def _add(self, record: FunctionRecord, value: NamedValue, *, own: bool, line: int | None = None) -> None:
        t = value.value
        if isinstance(t, (int, float)) and not isinstance(t, bool) and value.label.startswith("log("):
            t = torch.tensor(float(t))
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.numel() == 0:
            return
        stored = line_of(record.code, value.label)
        own = own and (stored is not None or not value.label.startswith(f"{owner_name(record.code)}."))
        line = line or stored or record.line
        live = t if isinstance(value.value, Tensor) else None
        self.numbers.append(Number(value.label, value.role, record, live, t.detach().clone(), t._version, own, line))

    def _log(self, name: Any, value: Any) -> None:
        caller = self._users.caller(sys._getframe(1))
        if caller is not None and isinstance(name, str) and self.is_kl(name):
            kept = value.detach().clone() if isinstance(value, Tensor) else value
            self.logged.append((caller, caller.f_lineno, name, kept))

    def _take_logged(self) -> None:
        by_frame = {id(record.frame): record for record in self.records}
        for frame, line, name, value in self.logged:
            if (record := by_frame.get(id(frame))) is not None:
                self._add(record, NamedValue(f"log({name!r})", name, value), own=True, line=line)

    def observe(self, call: Call) -> None:
        """Record the KL that one of this library's losses has computed, as its observer."""
        with contextlib.suppress(Exception):
            num_examples = call.batch.elements[: call.batch.num_example_dims].numel()
            divisor = 1 if call.reduction == "mean" else num_examples
            caller = self._users.caller(sys._getframe(1))
            where = "training_step" if caller is None else location(caller, caller.f_lineno)
            per_example = float(call.value.sum()) / divisor
            self.loss_calls.append(LossCall(self._paths[call.loss], where, call.q, call.p, call.value, per_example))


def _pair_of_kl_div(arguments: Mapping[str, Any]) -> tuple[Distribution, Distribution]:
    """Return the (q, p) of a call of `F.kl_div`, KL(target‖input), as probabilities, their logarithms or raw scores."""
    target, given = arguments["target"], arguments["input"]
    is_log = bool(arguments.get("log_target", False))
    q = Categorical(logits=target, validate_args=False) if is_log else _categorical_of(target)
    return q, _categorical_of(given)


def _categorical_of(t: Tensor) -> Distribution:
    are_probabilities = bool((t >= 0).all()) and torch.allclose(t.sum(-1), torch.ones(()).to(t), atol=1e-3)
    return Categorical(**{"probs" if are_probabilities else "logits": t}, validate_args=False)


def _num_arguments(step: Callable[..., Any]) -> int:
    """Return the number of arguments of a step: the batch alone, or its index as well."""
    try:
        inspect.signature(step).bind(None, 0)
    except TypeError:
        return 1
    return 2


@contextlib.contextmanager
def _logging_to(module: nn.Module, receive: Callable[[Any, Any], None]) -> Iterator[None]:
    """Replace `log` and `log_dict` by recorders, on the module and on its submodules that have them."""

    def log(name: Any, value: Any, *args: Any, **kwargs: Any) -> None:
        receive(name, value)

    def log_dict(metrics: Mapping[Any, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in metrics.items():
            receive(name, value)

    recorders = {"log": log, "log_dict": log_dict}
    replaced = [
        (m, name, vars(m).get(name)) for m in module.modules() for name in recorders if callable(getattr(m, name, None))
    ]
    for m, name, _ in replaced:
        vars(m)[name] = recorders[name]
    try:
        yield
    finally:
        for m, name, before in replaced:
            vars(m).pop(name) if before is None else vars(m).update({name: before})


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Run compiled code in eager mode, so that it can be watched."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None or "torch._dynamo" not in sys.modules:
        yield
        return
    with set_stance("force_eager"):
        yield
