"""Bytes that a computation on the meta device would hold at once: a storage counts until nothing refers to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Count(TorchDispatchMode):
    """Adds the storage of every result, and takes it off again when it is freed."""

    def __init__(self, known: Iterable[Tensor], device: str) -> None:
        super().__init__()
        self.device = device
        self.live, self.most = 0, 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_flatten(result)[0]:
            if isinstance(item, Tensor) and item.device.type == self.device:
                self._add(item.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def peak_bytes(run: Callable[[], object], known: Iterable[Tensor], device: str = "meta") -> int:
    """Most bytes that ``run`` holds at once on a kind of device, besides those of ``known`` tensors (weights, inputs).

    ``run`` returns nothing that lives on. torch's allocator would count the same up to its rounding and up to the
    workspace of a kernel.
    """
    with Count(known, device) as count:
        run()
    return count.most


__all__ = ["Count", "peak_bytes"]
