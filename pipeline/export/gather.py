"""ZeRO shards on disk -> named tensors, one at a time, without a GPU and without the engine.

Lazy gathering keeps one tensor in memory besides the memory-mapped shards, so a model far larger than one rank's
memory can be exported (a 335 GB checkpoint on a 192 GB host was llm-foundry issue 463).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.engine.checkpoint import TAG, Checkpoint
from pipeline.engine.durable import failed_writes_as_os_error

logger = logging.getLogger(__name__)


def iterate_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and full tensor of every trained parameter and buffer in a checkpoint, floats cast to ``dtype``.

    Frozen parameters are not in the checkpoint; they come from the recipe's source folders.
    """
    from pipeline.engine.zero import fp32_state

    for name, lazy in fp32_state(checkpoint.path, TAG).items():
        tensor = lazy.contiguous()
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def write_safetensors(
    tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, max_shard_bytes: int, stem: str = "model"
) -> list[str]:
    """Stream tensors into ``model.safetensors`` or numbered shards with an index, as Hugging Face reads them.

    Holds at most one shard in memory. Returns the names written.

    Raises:
        OSError: a shard could not be written.
    """
    shard: dict[str, torch.Tensor] = {}
    size = total = 0
    files: list[tuple[Path, list[str]]] = []

    def flush() -> None:
        nonlocal shard, size
        path = folder / f".{stem}-{len(files):05d}.part"
        with failed_writes_as_os_error(path.name):
            save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)
        files.append((path, list(shard)))
        shard, size = {}, 0

    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if shard and size + bytes_ > max_shard_bytes:
            flush()
        shard[name] = tensor.contiguous()
        size, total = size + bytes_, total + bytes_
    if shard or not files:
        flush()
    if len(files) == 1:
        files[0][0].rename(folder / f"{stem}.safetensors")
        return files[0][1]
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(files, 1):
        target = f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / target)
        weight_map |= dict.fromkeys(names, target)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return list(weight_map)
