"""A device that the CPU pretends to be, with the rules of a real one, for machines that have none.

Its tensors hold their numbers on the CPU, and have autograd. Tensors of two devices may not meet; on a device without
float64 none can be made, as on Apple's. Counted are the kernels, the waits of the host for the device, and the bytes
in use.

It must be made before the first backward pass of a process, so that whoever needs it starts a process for it.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from torch_klloss.numerics import devices

NAME = "pretend"
WAITS = {  # operations whose result, or its shape, depends on values on the device
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
}
NO_KERNEL = {"detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
MOVES = {"_to_copy", "copy_", "_copy_from", "_copy_from_and_resize"}
WIDE = (torch.float64, torch.complex128)


class Counts:
    """What happened on the device.

    Attributes:
        float64: whether the device has it.
        waits: how often the host waited, by the line of the library that made it wait, and by the operation.
        kernels: how often an operation was launched, by its name.
        bytes: how many are in use.
        peak: the most that were.
    """

    def __init__(self) -> None:
        self.float64 = True
        self.bytes = 0
        self.storages: dict[int, int] = {}
        self.clear()

    def clear(self) -> None:
        """Start again, with what is in use now."""
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.peak = self.bytes

    @property
    def num_waits(self) -> int:
        """How often the host waited."""
        return self.waits.total()

    @property
    def num_kernels(self) -> int:
        """How many kernels were launched."""
        return self.kernels.total()

    def wait(self, operation: str) -> None:
        """Count a wait."""
        self.waits[f"{operation} in {_place()}"] += 1

    def hold(self, storage: Any) -> None:
        """Count the bytes of a storage until nothing holds it."""
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)

    def drop(self, key: int) -> None:
        """Count the bytes of a storage no longer."""
        self.bytes -= self.storages.pop(key, 0)


COUNTS = Counts()
_HOLDERS: Counter[int] = Counter()  # tensors by storage


class PretendedTensor(Tensor):
    """A tensor on the device; `host` has its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> PretendedTensor:
        """Wrap a tensor of the CPU."""
        if host.dtype in WIDE and not COUNTS.float64:
            raise TypeError(f"the device {NAME!r} has no float64")
        new = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        new.host = host
        storage = host.untyped_storage()
        COUNTS.hold(storage)
        _HOLDERS[storage._cdata] += 1
        weakref.finalize(host, _release, storage._cdata)
        return new

    def __repr__(self) -> str:
        """Show the numbers."""
        return f"PretendedTensor({self.host!r})"

    def tolist(self) -> Any:
        """Return the numbers, which torch gives of no subclass."""
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Launch an operation."""
        return launch(func, args, kwargs or {})


def _release(key: int) -> None:
    _HOLDERS[key] -= 1
    if not _HOLDERS[key]:
        del _HOLDERS[key]
        COUNTS.drop(key)


def is_pretended(device: Any) -> bool:
    """Return whether this is the device."""
    return device is not None and torch.device(device).type == NAME


def launch(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the numbers, by the rules of the device."""
    name = func.overloadpacket.__name__
    tensors = _tensors_in(args) + _tensors_in(kwargs.values())
    ours = [x for x in tensors if isinstance(x, PretendedTensor)]
    others = [x for x in tensors if not isinstance(x, PretendedTensor)]
    target = kwargs.get("device")
    if ours and name not in MOVES and any(x.dim() for x in others):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu in {func}")
    if name == "where" and ours and not isinstance(args[0], PretendedTensor):
        raise RuntimeError(f"expected condition, x and y to be on the same device, but condition is on cpu in {func}")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != NAME and name != "_to_copy":
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    _count(func, name, args, bool(ours), others, target)
    plain_args, plain = _mapped(PretendedTensor, lambda x: x.host, (args, kwargs))
    if is_pretended(target):
        plain["device"] = torch.device("cpu")
    out = func(*plain_args, **plain)
    to_host = name == "_to_copy" and target is not None and not is_pretended(target)
    if to_host or not (ours or is_pretended(target)):
        return out
    if name == "copy_" and not isinstance(args[0], PretendedTensor):
        return args[0]
    return return_and_correct_aliasing(func, args, kwargs, _mapped(Tensor, PretendedTensor, out))


def _mapped(kind: type, function: Callable[[Any], Any], x: Any) -> Any:
    """Return nested arguments with a function applied to all of a kind."""
    if isinstance(x, kind):
        return function(x)
    if type(x) in (tuple, list):
        return type(x)([_mapped(kind, function, each) for each in x])
    return {key: _mapped(kind, function, each) for key, each in x.items()} if type(x) is dict else x


def _tensors_in(arguments: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among arguments of an operation, and in lists of them."""
    found: list[Tensor] = []
    for x in arguments:
        if isinstance(x, Tensor):
            found.append(x)
        elif type(x) in (tuple, list):
            found += _tensors_in(x)
    return found


def _count(func: Any, name: str, args: Any, has_ours: bool, others: list[Tensor], target: Any) -> None:
    is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
    if name in WAITS or _is_by_mask(name, args):
        COUNTS.wait(name)
    elif name == "_to_copy" and target is not None and is_pretended(target) != has_ours:
        COUNTS.wait("copy to the host" if has_ours else "copy from the host")
    elif name == "copy_" and has_ours and others:
        COUNTS.wait("copy to the host" if others[0] is args[0] else "copy from the host")
    elif not (is_view or name in NO_KERNEL):
        COUNTS.kernels[name] += 1


def _is_by_mask(name: str, args: Any) -> bool:
    """Return whether the operation must first count where a mask is set."""
    if name == "index":
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name in ("index_put", "index_put_", "_index_put_impl_"):
        return args[2].numel() > 1 and any(i is not None and i.dtype == torch.bool for i in args[1])
    return False


def _place() -> str:
    """Return the innermost line of the library that is being run."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        _, found, path = frame.f_code.co_filename.rpartition("/torch_klloss/")
        if found:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"


class _Factories(TorchDispatchMode):
    """Makes on the device what is asked to be made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return launch(func, args, kwargs) if is_pretended(kwargs.get("device")) else func(*args, **kwargs)


class _Module:
    """What torch asks of the module of a device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield


_LIBRARIES: list[Any] = []


def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *, dtype: Any = None, **options: Any) -> Tensor:
        return PretendedTensor(torch.empty(size, dtype=dtype))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **options: Any) -> Tensor:
        return PretendedTensor(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        COUNTS.wait("copy to the host" if isinstance(source, PretendedTensor) else "copy from the host")
        from_, to = (x.host if isinstance(x, PretendedTensor) else x for x in (source, target))
        to.copy_(from_)
        return target

    # What torch calls below any mode, as for torch.as_tensor(number, device=…).
    for name, function in {
        "empty.memory_format": empty,
        "empty_strided": empty_strided,
        "_copy_from": copy_from,
    }.items():
        library.impl(name, function, "PrivateUse1")
    _LIBRARIES.append(library)


@contextmanager
def pretended(*, float64: bool = True) -> Iterator[Counts]:
    """Pretend the device for the block, with or without float64; the block gets what is counted."""
    if not _LIBRARIES:
        _register()
    COUNTS.float64 = float64
    devices._HAVE_FLOAT64.pop(NAME, None)  # real devices do not change in this
    COUNTS.clear()
    with _Factories():
        yield COUNTS
