"""Writes safetensors files tensor by tensor, so that one tensor is in memory and not one file.

The format (https://huggingface.co/docs/safetensors, "Format"): 8 bytes little-endian length of the header, the header
as JSON, the data. The header is known before any tensor is read, because names, shapes and types are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pipeline.engine.durable import failed_writes_as_os_error
from pipeline.errors import CheckpointError
from pipeline.export.entry import Entry

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_PIECE_BYTES = 16 * 1024**2
"""Cast, hashed and written at a time."""
_ALIGNMENT = 8
"""The header is padded to it, so that data of any type starts aligned."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file of an export and what goes into it."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(_header(self.entries)) + sum(entry.size for entry in self.entries)


def plan_files(entries: Iterable[Entry], max_bytes: int, stem: str = "model") -> list[PlannedFile]:
    """``model.safetensors``, or numbered files of at most ``max_bytes`` of tensors each, in the order given.

    A tensor is never split: a larger one gets a file of its own.
    """
    parts: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if parts[-1] and size + entry.size > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.size
    if len(parts) == 1:
        return [PlannedFile(f"{stem}.safetensors", _aligned(parts[0]))]
    return [
        PlannedFile(f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors", _aligned(part))
        for number, part in enumerate(parts, 1)
    ]


def index_of(files: Sequence[PlannedFile]) -> dict[str, Any] | None:
    """The index that Hugging Face reads beside several files; None for a single one."""
    if len(files) == 1:
        return None
    total = sum(entry.size for file in files for entry in file.entries)
    return {
        "metadata": {"total_size": total},
        "weight_map": {entry.name: file.name for file in files for entry in file.entries},
    }


def write_file(path: Path, planned: PlannedFile, written: Callable[[Entry], None] = lambda entry: None) -> str:
    """Write and flush to the disk one file; returns its sha256.

    One tensor is in memory at a time, as its `read` returns it, and a piece of it in the written type.

    Args:
        written: called after each tensor.

    Raises:
        OSError: it could not be written.
        CheckpointError: a tensor has another shape than planned, or a type that safetensors does not have.
    """
    with failed_writes_as_os_error(path.name), path.open("wb") as file, ThreadPoolExecutor(1) as hasher:
        sink = _Sink(file, hasher)
        sink.write(_header(planned.entries))
        for entry in planned.entries:
            _write_tensor(sink, entry)
            written(entry)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)
    return sink.digest.hexdigest()


class _Sink:
    """Writes and hashes each piece at the same time."""

    def __init__(self, file: BinaryIO, hasher: ThreadPoolExecutor) -> None:
        self.file, self.hasher, self.digest = file, hasher, hashlib.sha256()

    def write(self, piece: Any) -> None:
        hashed = self.hasher.submit(self.digest.update, piece)
        self.file.write(piece)
        hashed.result()


def _write_tensor(sink: _Sink, entry: Entry) -> None:
    tensor = entry.read()
    if tuple(tensor.shape) != entry.shape:
        raise CheckpointError(
            f"{entry.name} has shape {tuple(tensor.shape)}, expected {entry.shape}; where it is read from changed "
            "while the export ran: start it again"
        )
    flat_N = tensor.detach().reshape(-1)
    for piece_N in flat_N.split(max(1, _PIECE_BYTES // max(1, flat_N.element_size()))):
        if len(piece_N):
            sink.write(piece_N.to(entry.dtype).contiguous().view(torch.uint8).numpy().data)


def _aligned(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Wide types first, as the safetensors library orders them: no tensor starts in the middle of its own numbers."""
    return tuple(sorted(entries, key=lambda entry: -entry.dtype.itemsize))


def _header(entries: Iterable[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for entry in entries:
        if entry.dtype not in _NAMES:
            raise CheckpointError(
                f"{entry.name} is {entry.dtype}, which safetensors files do not hold; export a model without it"
            )
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offset, offset + entry.size],
        }  # fmt: skip
        offset += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
