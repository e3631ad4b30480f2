"""A device that is none: what a step waits for is counted on a machine without a GPU.

`cpu:0` is where the fake device is. torch computes there as on the CPU, but a tensor that was made or sent
there is known from then on, and all that comes of it; so each place is seen at which a GPU's host would wait.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 0)
aten = torch.ops.aten
# Their results, or the shapes of these, are known to the host only when the device has computed them
_READING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
    aten.is_nonzero.default, aten._unique2.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip


class Watched(TorchDispatchMode):
    """Knows what lies on the device, and notes in `waits`, while it is `on`, who waits for it, and where."""

    def __init__(self) -> None:
        """Nothing lies there yet."""
        super().__init__()
        self.waits: list[str] = []
        self.computed = 0  # operators on the device while `on`: that there was something to wait for
        self.on = False
        self._there: dict[int, StorageWeakRef] = {}  # a weak reference keeps its address from being used anew

    def there(self, tensor: Any) -> bool:
        """Whether `tensor` lies on the device."""
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._there

    def note(self, what: str) -> None:
        """Somebody waits."""
        if self.on:
            frames = [
                f for f in traceback.extract_stack() if "/lcm_kit/" in f.filename or "/train/" in f.filename
            ]
            where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
            self.waits.append(f"{what} at {where}")

    def _put(self, made: Any) -> None:
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._there[storage._cdata] = StorageWeakRef(storage)

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [t for t in tensors if not self.there(t)]
        there = len(here) < len(tensors)
        self.computed += there and self.on
        if f in (aten._to_copy.default, aten.copy_.default):
            return self._copied(f, args, kwargs)
        if there and f in _READING:
            self.note(f.__name__)
        elif there and any(t.dtype in (torch.bool, torch.uint8) for t in _indices(f, args)):
            self.note("an index by a mask")
        elif there and any(t.ndim for t in here):
            self.note(f"{f.__name__} of tensors here and there")  # an index is copied; all else is an error
        made = f(*args, **kwargs)
        if kwargs.get("device") == DEVICE or (there and kwargs.get("device") is None):
            self._put(made)
        return made

    def _copied(self, f: Any, args: Any, kwargs: Any) -> Any:
        """To the device or from it; `copy_` into a tensor leaves that where it is."""
        into = f is aten.copy_.default
        source = args[1] if into else args[0]
        goes = (
            self.there(args[0])
            if into
            else kwargs.get("device", DEVICE if self.there(source) else None) == DEVICE
        )
        waits = not (kwargs.get("non_blocking") or (into and len(args) > 2 and args[2]))
        if goes != self.there(source) and waits:
            self.note("a copy to the device" if goes else "a copy from the device")
        made = f(*args, **kwargs)
        if goes:
            self._put(made)
        return made


def _indices(f: Any, args: Any) -> list[Tensor]:
    if f not in (
        aten.index.Tensor,
        aten.index_put.default,
        aten.index_put_.default,
        aten._index_put_impl_.default,
    ):
        return []
    return [t for t in args[1] if t is not None]


@contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Within the block what is on `DEVICE` is known, and reading it through Python is noted too."""
    mode = Watched()
    for name in ("tolist", "numpy", "cpu", "__array__"):
        real = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
            if mode.there(self):
                mode.note(_name)
            return _real(self, *args, **kwargs)

        patch.setattr(Tensor, name, read)
    real_device = Tensor.device.__get__
    # what is made where another tensor is belongs there, too
    patch.setattr(
        Tensor, "device", property(lambda t: DEVICE if mode.there(t) else real_device(t)), raising=False
    )
    with mode:
        yield mode
