"""What one rank saves, as it was at one moment, in host memory: training goes on while it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.engine.setup import quiet_deepspeed


class HostBuffers:
    """Host memory for one snapshot, kept for the next: touching fresh memory takes several times as long as the copy.

    Pinned for what is on a CUDA device.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[torch.Tensor]] = {}
        self._taken: dict[tuple[int, bool], list[torch.Tensor]] = {}

    def begin(self) -> None:
        """A new snapshot: the one before is no longer needed."""
        self._free, self._taken = self._taken, {}

    def end(self) -> None:
        """The snapshot is whole; memory that it no longer needed is given back."""
        self._free = {}
        if torch.cuda.is_available() and any(pinned for _, pinned in self._taken):
            torch.cuda.synchronize()

    @property
    def size(self) -> int:
        """Bytes of the snapshot."""
        return sum(size * len(buffers) for (size, _), buffers in self._taken.items())

    def copy(self, tree: Any) -> Any:
        """The same containers and objects around copied tensors.

        Tensors that share memory share it in the copy, too, so both are the same bytes in a file.
        """
        tensors = {id(tensor): tensor for tensor in _tensors(tree)}
        storages: dict[int, torch.UntypedStorage] = {}
        memo: dict[int, Any] = {number: self._tensor(tensor, storages) for number, tensor in tensors.items()}
        for number, tensor in tensors.items():
            memo[number].__dict__.update(copy.deepcopy(vars(tensor), memo))
        return copy.deepcopy(tree, memo)

    def _tensor(self, tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = self._storage(storage)
        copied = torch.empty(0, dtype=tensor.dtype)
        copied.set_(storages[storage._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
        if type(tensor) is torch.nn.Parameter:
            return torch.nn.Parameter(copied, tensor.requires_grad)
        return copied.requires_grad_(tensor.requires_grad)

    def _storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        kind = (storage.nbytes(), storage.device.type == "cuda")
        free = self._free.get(kind, [])
        buffer = free.pop() if free else torch.empty(kind[0], dtype=torch.uint8, pin_memory=kind[1])
        self._taken.setdefault(kind, []).append(buffer)
        source = torch.empty(0, dtype=torch.uint8, device=storage.device)
        buffer.copy_(source.set_(storage, 0, (kind[0],), (1,)), non_blocking=kind[1])
        return buffer.untyped_storage()


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Those in nested containers; what other objects hold is copied with them."""
    if type(tree) in (torch.Tensor, torch.nn.Parameter):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


@dataclass(frozen=True, slots=True)
class Captured:
    """What DeepSpeed would have written on this rank."""

    files: dict[Path, Callable[[], None]] = field(default_factory=dict)
    """Each writes one."""
    scripts: list[Callable[[], None]] = field(default_factory=list)
    """Copy DeepSpeed's own conversion scripts beside them."""


class _CaptureEngine:
    """Stands in for DeepSpeed's checkpoint engine: notes what is to be saved, and writes nothing."""

    def __init__(self, engine: Any, captured: Captured, take: Callable[[Any], Any]) -> None:
        self._engine, self._captured, self._take = engine, captured, take

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """The writer makes folders."""

    def save(self, state_dict: Any, path: str) -> None:
        self._captured.files[Path(path)] = partial(self._engine.save, self._take(state_dict), path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def capture(engine: Any, save: Callable[[], Any], take: Callable[[Any], Any]) -> Captured:
    """What ``save`` would have written through DeepSpeed's engine. All ranks must call.

    Args:
        engine: DeepSpeed's.
        save: calls its `save_checkpoint`.
        take: gets the state of every file as DeepSpeed collects it, and returns what is to be written.
    """
    captured, before = Captured(), engine.checkpoint_engine
    copy_scripts = engine._copy_recovery_script
    engine.checkpoint_engine = _CaptureEngine(before, captured, take)
    engine._copy_recovery_script = lambda folder: captured.scripts.append(partial(copy_scripts, folder))
    try:
        with quiet_deepspeed():
            save()
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script  # its own one shows again
    return captured
