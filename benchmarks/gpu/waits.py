"""Where a step makes the host wait for the device: counted on CUDA by torch, on a CPU by a stand-in.

The stand-in follows storages. What a model holds and what is moved to ``STAND_IN`` "lives on the device", and so does
whatever is computed from it; everything else lives on the host. An operation that on CUDA would wait for the device (a
value read by Python, a size that depends on values, an unpinned copy in either direction) is counted when it touches
such a storage. So a number that never left the host costs nothing here, as on a GPU.
"""

from __future__ import annotations

import collections
import contextlib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

from benchmarks.gpu.rows import ROOT

STAND_IN = torch.device("cpu", 0)
"""The device of a run whose waits are counted on a CPU: equal to the CPU for torch, told apart from it here."""
Lines = collections.Counter[str]

_VALUES = frozenset({
    "_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero", "_unique2", "unique_consecutive",
    "unique_dim",
})  # fmt: skip
"""Operations whose result, or its size, the host needs before it can go on."""
_INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
_TOLD = "called a synchronizing CUDA operation"
_READS = frozenset({"tolist", "numpy", "__array__"})
"""Methods that read memory without an operation that a dispatch mode would see."""
_NOT_NAMED = (str(Path(torch.__file__).parent), str(Path(__file__)), str(Path(contextlib.__file__)))


def line() -> str:
    """``path:line function`` of the innermost caller outside torch; the path is short for this project's files."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_NAMED):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    shown = str(path).rpartition("site-packages/")[2]
    if "site-packages" not in path.parts and path.is_relative_to(ROOT):
        shown = str(path.relative_to(ROOT))
    return f"{shown}:{frame.f_lineno} {frame.f_code.co_name}"


def by_function(lines: Lines) -> Lines:
    """The same counts by ``path function``, which outlives an edit above the line."""
    functions = Lines()
    for name, count in lines.items():
        functions[re.sub(r":\d+ ", " ", name)] += count
    return functions


class _OnDevice:
    """Storages that would live on the device. Weak references keep their addresses from being used again."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}

    def add(self, tensors: Iterable[object]) -> None:
        for tensor in tensors:
            if _has_storage(tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self._known[reference.cdata] = reference

    def __contains__(self, tensor: object) -> bool:
        # ZeRO-3 gives a parameter new storage all the time
        return isinstance(tensor, nn.Parameter) or (
            _has_storage(tensor) and tensor.untyped_storage()._cdata in self._known
        )

    def any(self, tree: object) -> bool:
        return any(leaf in self for leaf in tree_iter(tree))


def _has_storage(value: object) -> Any:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


class _Operations(TorchDispatchMode):
    """Counts operations that wait, and spreads the device from inputs to results."""

    def __init__(self, on_device: _OnDevice, lines: Lines) -> None:
        super().__init__()
        self.on_device, self.lines = on_device, lines

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        touched = self.on_device.any((args, kwargs))
        if touched and self._waits(function, args, kwargs):
            self.lines[line()] += 1
        result = function(*args, **kwargs)
        if touched:
            written = [
                value
                for argument, value in zip(function._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            self.on_device.add(tree_iter((result, written)))
        return result

    def _waits(self, function: Any, args: Any, kwargs: Any) -> bool:
        name = function.overloadpacket.__name__
        if name in _INDEXED:
            indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
            return any(index.dtype in (torch.bool, torch.uint8) or index not in self.on_device for index in indices)
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        return name in _VALUES


class _Copies(TorchFunctionMode):
    """Counts copies between host and device, which on a CPU are none, and says on which of them a tensor is."""

    def __init__(self, on_device: _OnDevice, lines: Lines) -> None:
        super().__init__()
        self.on_device, self.lines = on_device, lines

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        first = args[0] if args else None
        if name == "__get__" and function == torch.Tensor.device.__get__:
            # a checkpoint compares devices once with and once without this mode
            checks = sys._getframe(1).f_code.co_filename == torch.utils.checkpoint.__file__
            return STAND_IN if first in self.on_device and not checks else function(*args, **kwargs)
        if name in _READS and first in self.on_device:
            self.lines[line()] += 1
        if name in ("to", "cpu") and isinstance(first, torch.Tensor):
            return self._moved(first, function, args, kwargs)
        if name == "where" and self.on_device.any(args):  # it copies what is not there, as any tensor is copied
            self.lines[line()] += any(isinstance(value, torch.Tensor) and value not in self.on_device for value in args)
        made_there = _is_stand_in(kwargs.get("device"))
        if made_there and name in ("tensor", "as_tensor") and not self.on_device.any(args):
            self.lines[line()] += 1
        result = function(*args, **kwargs)
        if made_there:
            self.on_device.add(tree_iter(result))
        return result

    @contextlib.contextmanager
    def in_backward(self) -> Iterator[None]:
        """Torch leaves the mode before a backward pass; this enters it again, for hooks and what is recomputed."""
        run = torch.autograd._engine_run_backward

        def inside(*args: Any, **kwargs: Any) -> Any:
            with self:
                return run(*args, **kwargs)

        with mock.patch.object(torch.autograd, "_engine_run_backward", inside):
            yield

    def _moved(self, tensor: torch.Tensor, function: Any, args: Any, kwargs: Any) -> Any:
        """The copy that a device would make."""
        given = [*args[1:], *kwargs.values()] if function is not torch.Tensor.cpu else ["cpu"]
        targets = [_is_stand_in(value) for value in given if isinstance(value, torch.device | str)]
        # torch copies from "cpu" to "cpu:0", and DeepSpeed relies on getting the same memory
        args, kwargs = tree_map_only(torch.device | str, _plain, (args, kwargs))
        if not targets or targets[0] == (tensor in self.on_device):
            return function(*args, **kwargs)
        if not kwargs.get("non_blocking", False):
            self.lines[line()] += 1
        with _disable_current_modes():
            moved = tensor.clone()
        if targets[0]:
            self.on_device.add([moved])
        return function(moved, *args[1:], **kwargs)


def _plain(device: torch.device | str) -> torch.device | str:
    return "cpu" if _is_stand_in(device) else device


def _is_stand_in(device: object) -> bool:
    return isinstance(device, torch.device | str) and torch.device(device) == STAND_IN


@contextlib.contextmanager
def _deepspeed_on(engine: Any) -> Iterator[None]:
    """DeepSpeed names the stand-in where it would name a GPU."""
    from deepspeed.accelerator import get_accelerator

    with contextlib.ExitStack() as patches:
        for name in ("device_name", "current_device_name"):
            patches.enter_context(mock.patch.object(get_accelerator(), name, lambda *_: str(STAND_IN)))
        if hasattr(engine.optimizer, "device"):
            patches.enter_context(mock.patch.object(engine.optimizer, "device", str(STAND_IN)))
        yield


def _held(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors that DeepSpeed's objects hold, at any depth."""
    if id(value) in seen or isinstance(value, nn.Module):
        return
    seen.add(id(value))
    parts: Iterable[Any] = ()
    if isinstance(value, torch.Tensor):
        yield value
        parts = (value.grad, getattr(value, "ds_tensor", None)) if value.is_leaf else ()
    elif isinstance(value, Mapping):
        # an optimizer without fused kernels counts its steps on the host
        parts = (each for key, each in value.items() if key != "step")
    elif isinstance(value, list | tuple | set | collections.deque):
        parts = value
    elif type(value).__module__.startswith(("deepspeed", "torch.optim")):
        parts = vars(value).values()
    for part in parts:
        yield from _held(part, seen)


@contextlib.contextmanager
def _counted_by_stand_in(engine: Any) -> Iterator[Lines]:
    lines, on_device = Lines(), _OnDevice()
    on_device.add(_held([*engine.module.parameters(), *engine.module.buffers(), engine.optimizer], set()))
    copies = _Copies(on_device, lines)
    with _deepspeed_on(engine), copies.in_backward(), copies, _Operations(on_device, lines):
        yield lines


@contextlib.contextmanager
def _counted_by_torch() -> Iterator[Lines]:
    """Torch tells of operations that wait, and of a stream; not of waiting for a device or an event."""
    lines = Lines()

    def told(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            lines[line()] += 1
            return function(*args, **kwargs)

        return call

    def tell(message: Any, category: Any, filename: str, lineno: int, file: Any = None, text: Any = None) -> None:
        if _TOLD in str(message):  # switching the mode on tells something, too
            lines[line()] += 1

    with warnings.catch_warnings(), contextlib.ExitStack() as patches:
        for owner in (torch.cuda, torch.cuda.Event):
            patches.enter_context(mock.patch.object(owner, "synchronize", told(owner.synchronize)))
        warnings.simplefilter("always")
        warnings.showwarning = tell
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")


def counted(engine: Any, device: torch.device) -> contextlib.AbstractContextManager[Lines]:
    """What makes the host wait while the context is open, by line.

    Args:
        engine: DeepSpeed's; what it holds lives on the device.
        device: `STAND_IN`, or a CUDA device.
    """
    return _counted_by_torch() if device.type == "cuda" else _counted_by_stand_in(engine)
