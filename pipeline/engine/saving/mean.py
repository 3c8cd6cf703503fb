"""The mean of a run's last checkpoints, as a checkpoint that `slt export` reads (checkpoint averaging, as in Vaswani et
al., arXiv 1706.03762, section 6.1)."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.engine.checkpoint import (
    FORMAT_VERSION,
    TAG,
    Checkpoint,
    checkpoint_folder,
    damage,
    open_checkpoint,
    own_folders,
    step_of,
)
from pipeline.engine.durable import failed_writes_as_os_error, sha256_of, write_durably
from pipeline.engine.saving.publish import publish, temporary_folder
from pipeline.engine.zero_shards import ZeroShards
from pipeline.errors import CheckpointError, DamagedCheckpointError

logger = logging.getLogger(__name__)

_FROM_THE_NEWEST = ("state.json", "recipe.resolved.yaml")


def mean_of_last(run_dir: Path, last: int, out: Path | None = None) -> Path:
    """Average the weights of the ``last`` newest complete checkpoints. Needs memory for one fp32 copy of what the run
    trains.

    Where the run keeps means over its steps (`train.averaging`), these are averaged.

    Args:
        run_dir: of the run.
        last: how many; at least 2.
        out: new folder; default: beside the checkpoints, named after the first and last step.

    Returns:
        The folder: a checkpoint of one rank without optimizer, which no run resumes from.

    Raises:
        CheckpointError: the run has fewer, they hold other parameters, or the folder exists or cannot be written.
        DamagedCheckpointError: a byte of one is not as it was written.
    """
    folders = own_folders(run_dir)[-last:]
    if last < 2 or len(folders) < last:
        raise CheckpointError(
            f"{run_dir} has {len(folders)} complete checkpoints, a mean needs at least 2 and --last asks for {last}; "
            "keep more with train.checkpoint.keep, or lower --last"
        )
    if out is None:
        steps = f"{step_of(folders[0]):06d}-{step_of(folders[-1]):06d}"
        out = checkpoint_folder(run_dir) / f"mean-{steps}"
    if out.exists():
        raise CheckpointError(f"{out} exists; remove it, or name a new folder with --out")
    checkpoints = [_intact(folder) for folder in folders]
    temporary = temporary_folder(out)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / TAG).mkdir(parents=True)
        with failed_writes_as_os_error("the mean"):
            torch.save(_mean(checkpoints), temporary / TAG / "mp_rank_00_model_states.pt")
        for name in _FROM_THE_NEWEST:
            shutil.copyfile(checkpoints[-1].path / name, temporary / name)
        shutil.copytree(checkpoints[-1].path / "hf", temporary / "hf")
        write_durably(temporary / "manifest.json", json.dumps(_manifest(temporary, checkpoints), indent=1))
        publish(out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{out} could not be written: {error}; free space, or name another with --out") from error
    logger.info("%s: mean of %s", out, ", ".join(folder.name for folder in folders))
    return out


def _intact(folder: Path) -> Checkpoint:
    if problems := damage(folder):
        raise DamagedCheckpointError(
            f"checkpoint {folder} is damaged:\n  " + "\n  ".join(problems) + "\n  fix: restore these files from a copy"
        )
    return open_checkpoint(folder)


def _mean(checkpoints: list[Checkpoint]) -> dict[str, Any]:
    """What DeepSpeed writes without ZeRO: whole tensors, tied ones sharing their memory."""
    of_all = [ZeroShards.open(checkpoint.path / TAG) for checkpoint in checkpoints]
    newest = of_all[-1]
    for shards in of_all[:-1]:
        if shards.parameters != newest.parameters or shards.exported != newest.exported:
            raise CheckpointError(f"{shards.folder} and {newest.folder} hold other parameters; average one run's own")
    module: dict[str, torch.Tensor] = {}
    for name in newest.parameters:
        total = sum(shards.tensor(name, shards.exported).double() for shards in of_all)
        module[name] = torch.as_tensor(total / len(of_all)).float()
    module |= {name: module[stored] for name, stored in newest.shared.items() if stored in module}
    buffers = newest.buffers()
    return {
        "module": module | buffers, "buffer_names": list(buffers), "optimizer": {"state": {}, "param_groups": []},
        "dp_world_size": 1, "ds_version": newest.deepspeed_version, **newest.counts(),
    }  # fmt: skip


def _manifest(folder: Path, checkpoints: list[Checkpoint]) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = {str(f.relative_to(folder)): {"size": f.stat().st_size, "sha256": sha256_of(f)} for f in files}
    newest = checkpoints[-1].manifest
    return newest | {
        "format_version": FORMAT_VERSION, "world_size": 1, "zero_stage": 0, "time": round(time.time()), "parts": parts,
        "mean_of": [checkpoint.path.name for checkpoint in checkpoints],
    }  # fmt: skip
