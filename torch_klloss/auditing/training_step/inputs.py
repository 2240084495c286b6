"""torch_klloss/auditing/training_step/inputs.py."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_TABLES = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_hooks_with_kwargs")


@contextlib.contextmanager
def private_copy(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy; where there can be none, as of one that holds tensors of a graph, itself, which is put back."""
    try:
        own = copy.deepcopy(module)
    except Exception:
        own = None
    if own is not None:
        yield own
        return
    with _put_back(module):
        yield module


@contextlib.contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    tables = [(m, dict(vars(m)), {t: vars(m)[t].copy() for t in _TABLES}) for m in module.modules()]
    tensors = [(t, t.detach().clone(), t.grad) for t in (*module.parameters(), *module.buffers())]
    grads = [None if grad is None else grad.clone() for _, _, grad in tensors]
    try:
        yield
    finally:
        for m, attributes, inner in tables:
            vars(m).clear()
            vars(m).update(attributes)
            for table, entries in inner.items():
                vars(m)[table].clear()
                vars(m)[table].update(entries)
        with torch.no_grad():
            for (t, value, grad), kept in zip(tensors, grads, strict=True):
                if not torch.equal(t, value):
                    t.copy_(value)
                if grad is not None and kept is not None:
                    grad.copy_(kept)
                t.grad = grad


def parts_of(batch: Any) -> list[Any]:
    """Return parts of a batch, of other sizes than the whole; none where nothing says which dimension is the batch."""
    sizes = [t.shape[0] for t in _tensors_in(batch) if t.dim() > 0]
    if not sizes or sizes[0] < 4:
        return []
    size = sizes[0]
    slices = slice(0, size - size // 3), slice(size // 2, size), slice(size // 4, size)
    return [_sliced(batch, size, s) for s in slices]


def _tensors_in(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from (t for value in batch.values() for t in _tensors_in(value))
    elif isinstance(batch, (list, tuple)):
        yield from (t for value in batch for t in _tensors_in(value))


def _sliced(batch: Any, size: int, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part] if batch.dim() > 0 and batch.shape[0] == size else batch
    if isinstance(batch, Mapping):
        return {key: _sliced(value, size, part) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = [_sliced(value, size, part) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
