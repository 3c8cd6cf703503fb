"""Writes one checkpoint: shards and small files into a temporary folder, their hashes, then its name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline import dist
from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.checkpoint import FORMAT_VERSION, TAG, checkpoint_folder, universal_folder
from pipeline.engine.durable import failed_writes_as_os_error, sha256_of, write_durably
from pipeline.engine.saving.publish import COMPLETE, publish, temporary_folder
from pipeline.engine.setup import TrainEngine, quiet_deepspeed
from pipeline.engine.state import TrainState, rng_state
from pipeline.errors import CheckpointError
from pipeline.stages.base import AnyStage
from pipeline.stages.freezing import frozen_names


def save(engine: TrainEngine, stage: AnyStage, run_dir: Path, resolved: ResolvedRecipe, state: TrainState) -> Path:
    """Write one checkpoint. All ranks must call.

    Raises:
        CheckpointError: a part could not be written (full disk, permissions); earlier checkpoints are untouched.
    """
    folder = checkpoint_folder(run_dir)
    final = folder / f"step-{state.step:06d}"
    temporary = temporary_folder(final)
    module = engine.module
    module.eval()
    probe = stage.probe(engine.forward)
    module.train()
    try:
        with _clean_after_failure(temporary):
            if dist.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            dist.barrier()
            _write_shards(engine, temporary)
            if dist.is_main():
                _write_files(temporary, resolved, state, probe)
                _write_export_files(stage, temporary / "hf")
            dist.barrier()
            parts = _hash_parts(temporary)
        with _clean_after_failure(temporary) if dist.is_main() else contextlib.nullcontext():
            if dist.is_main():
                manifest = {
                    "format_version": FORMAT_VERSION, "step": state.step, "world_size": dist.world_size(),
                    "zero_stage": resolved.ds_config["zero_optimization"]["stage"], "stage": resolved.recipe.stage,
                    "versions": resolved.versions, "git_commit": resolved.git_commit, "parts": parts,
                }  # fmt: skip
                write_durably(temporary / "manifest.json", json.dumps(manifest, indent=1))
                shutil.rmtree(universal_folder(final), ignore_errors=True)  # converted from an earlier attempt
                publish(final)
                (folder / "latest").unlink(missing_ok=True)  # earlier releases wrote it, and nothing moves it any more
            dist.barrier()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error}. Earlier checkpoints are untouched; free space or "
            "change run_dir, then start the run again: it resumes from the last complete checkpoint"
        ) from error
    return final


@contextlib.contextmanager
def _clean_after_failure(*folders: Path) -> Iterator[None]:
    """Remove unfinished folders when writing fails.

    While ranks write, every rank does: the last to fail, because another did, removes what was written meanwhile.
    Once rank 0 publishes, only rank 0 does: others may see an old state of a shared disk.
    """
    try:
        yield
    except BaseException:
        for folder in folders:
            if folder.is_dir() and not (folder / COMPLETE).is_file():
                shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_shards(engine: TrainEngine, folder: Path) -> None:
    frozen = bool(frozen_names(engine.module))
    with quiet_deepspeed(), failed_writes_as_os_error("the ZeRO shards"):
        engine.engine.save_checkpoint(
            str(folder), tag=TAG, client_state={}, save_latest=False, exclude_frozen_parameters=frozen
        )
        torch.save(rng_state(), folder / f"rng-rank-{dist.rank()}.pt")


def _write_files(folder: Path, resolved: ResolvedRecipe, state: TrainState, probe: dict[str, torch.Tensor]) -> None:
    texts = {"state.json": json.dumps(state.to_dict(), indent=1), "recipe.resolved.yaml": resolved.to_yaml()}
    for name, text in texts.items():
        with failed_writes_as_os_error(name):
            (folder / name).write_text(text, encoding="utf-8")
    with failed_writes_as_os_error("probe.safetensors"):
        save_file({key: value.contiguous() for key, value in probe.items()}, folder / "probe.safetensors")


def _write_export_files(stage: AnyStage, folder: Path) -> None:
    folder.mkdir()
    with failed_writes_as_os_error("the export files"):
        plan = stage.write_export_files(folder)
        (folder / "export.json").write_text(json.dumps(dataclasses.asdict(plan)), encoding="utf-8")


def _hash_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """Every rank syncs and hashes its share of the files; returns all of them on every rank."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    share_of_rank = {}
    for file in files[dist.rank() :: dist.world_size()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        share_of_rank[str(file.relative_to(folder))] = {"size": file.stat().st_size, "sha256": sha256_of(file)}
    return {name: part for share in dist.gather_objects(share_of_rank) for name, part in share.items()}
