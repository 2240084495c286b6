"""Checks that tensors have not been changed in place since they were read, as autograd makes them for saved ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor


class Versions:
    """The versions of tensors that a backward pass is going to read again; they are not kept alive."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._seen = [(weakref.ref(t), t._version) for t in tensors if not t.is_inference()]

    def check(self) -> None:
        """Raise a RuntimeError if one of the tensors was changed."""
        for reference, version in self._seen:
            tensor = reference()
            if tensor is not None and tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a tensor of shape {tuple(tensor.shape)}, which the KL read, is at version {tensor._version}; "
                    f"expected version {version} instead. Call backward() before the change, or change a clone."
                )


def may_be_changed(t: Tensor) -> bool:
    """Return whether a tensor may have been written to in place since it was made; no graph may ask."""
    return t.is_inference() or t._version > 0
