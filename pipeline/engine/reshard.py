"""A copy of a checkpoint in DeepSpeed's universal format (arXiv 2406.18820), for other programs on DeepSpeed.

A run of this project needs none: it reads the shards of any world size and ZeRO stage itself. One parameter is
converted at a time, so memory stays at one tensor.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.engine.checkpoint import TAG, Checkpoint, universal_folder, universal_tag
from pipeline.engine.durable import failed_writes_as_os_error, sha256_of, write_durably
from pipeline.engine.zero_shards import KINDS, ZeroShards
from pipeline.errors import CheckpointError

logger = logging.getLogger(__name__)

_BYTES_PER_ELEMENT = 4 * len(KINDS)
_BYTES_PER_PARAMETER = 16_384
"""More than the headers of its files."""


def to_universal(
    checkpoint: Checkpoint, out: Path | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Convert once (later calls reuse an intact result); returns the folder that DeepSpeed's ``load_checkpoint`` takes.

    Args:
        checkpoint: verified by the caller.
        out: new folder; default: a hidden one beside the checkpoint, removed together with it.
        progress: told the elements converted so far and their total.

    Raises:
        CheckpointError: it is no ZeRO checkpoint, the disk has no room, or the folder cannot be written.
    """
    folder = out or universal_folder(checkpoint.path)
    if (folder / "COMPLETE").is_file() and (folder / universal_tag(checkpoint)).is_dir():
        if (folder / "COMPLETE").read_text(encoding="utf-8") == _fingerprint(folder):
            return folder
        logger.warning("%s was damaged or made by an earlier release; converting again", folder)
    elif out is not None and out.is_dir() and any(out.iterdir()) and not (out / universal_tag(checkpoint)).is_dir():
        raise CheckpointError(f"{out} holds other files; name a new folder")
    shards = ZeroShards.open(checkpoint.path / TAG)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        _check_room(shards, folder)
        folder.mkdir(parents=True)
        _write(shards, folder / universal_tag(checkpoint), progress)
        write_durably(folder / "latest_universal", universal_tag(checkpoint))
        write_durably(folder / "COMPLETE", _fingerprint(folder))
    except OSError as error:
        raise CheckpointError(
            f"{checkpoint.path} could not be converted: {error}\n  fix: free space, or name another folder with --out"
        ) from error
    return folder


def _check_room(shards: ZeroShards, folder: Path) -> None:
    elements = sum(shape.numel() for shape in shards.parameters.values())
    needed = elements * _BYTES_PER_ELEMENT + len(shards.parameters) * _BYTES_PER_PARAMETER
    disk = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise CheckpointError(
            f"converting {shards.folder} needs {needed / 1e9:.2f} GB on the disk of {disk}, where {free / 1e9:.2f} GB "
            "are free; free space, or name another folder with --out"
        )


def _write(shards: ZeroShards, folder: Path, progress: Callable[[int, int], None]) -> None:
    done, total = 0, sum(shape.numel() for shape in shards.parameters.values())
    for name, shape in shards.parameters.items():
        part = folder / "zero" / name
        part.mkdir(parents=True)
        for kind, file in zip(KINDS, ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"), strict=True):
            _save({"param": shards.tensor(name, kind)}, part / file)
        _save(_step(shards, name), part / "step.pt")
        done += shape.numel()
        progress(done, total)
    groups = shards.hyperparameters()
    state = {
        "param_groups": groups, "ds_version": shards.deepspeed_version,
        # where the loader of stage 3 looks
        "optimizer_state_dict": {"state": {0: {"step": _step(shards, *shards.parameters)}}, "param_groups": groups},
    }  # fmt: skip
    _save(state, folder / "zero" / "optimizer_state.pt")
    model = {
        "module": shards.buffers(), "buffer_names": list(shards.buffers()), "shared_params": shards.shared,
        "optimizer": None, "lr_scheduler": None, "dp_world_size": shards.world_size, "mp_world_size": 1,
        "ds_version": shards.deepspeed_version, **shards.counts(),
    }  # fmt: skip
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):  # stages 0 to 2, stage 3
        _save(model, folder / file)


def _step(shards: ZeroShards, *names: str) -> torch.Tensor:
    return torch.tensor(float(max(shards.step(name) for name in names)))


def _save(value: Any, file: Path) -> None:
    with failed_writes_as_os_error(str(file)):
        torch.save(value, file)


def _fingerprint(folder: Path) -> str:
    """sha256 over the names and bytes of every converted file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)
    sums = "".join(f"{path.relative_to(folder)} {sha256_of(path)}\n" for path in files)
    return hashlib.sha256(sums.encode()).hexdigest()
