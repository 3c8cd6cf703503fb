"""Checkpoints that are complete or do not exist.

``run_dir/checkpoints/step-000100/`` holds ``deepspeed/`` (ZeRO shards), ``rng-rank-N.pt``, ``state.json``,
``recipe.resolved.yaml``, ``probe.safetensors`` (live outputs, the oracle of the export), ``manifest.json`` (size and
sha256 of every part, versions, world size) and, written last, ``COMPLETE``; ``checkpoints/latest`` names the newest.
It is written to a temporary folder first, so a crash at any moment leaves the previous checkpoint untouched.
DeepSpeed's own `latest` and tags are not used: it writes them before all ranks are done, and torch.load does not
notice flipped bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import dist
from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.setup import TrainEngine, quiet_deepspeed
from pipeline.engine.state import TrainState, restore_rng, rng_state
from pipeline.errors import CheckpointError
from pipeline.stages.base import Stage, frozen_names

logger = logging.getLogger(__name__)

TAG = "deepspeed"
FORMAT_VERSION = 1

# What torch.save says, in both of its formats, when a disk is full or a folder cannot be written: RuntimeErrors
# without errno.
_FAILED_WRITES = (
    "inline_container", "PytorchStreamWriter", "iostream", "write()", "Parent directory", "cannot be opened"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def world_size(self) -> int:
        return int(self.manifest["world_size"])

    def state(self) -> TrainState:
        return TrainState.from_dict(json.loads((self.path / "state.json").read_text(encoding="utf-8")))

    def resolved(self) -> ResolvedRecipe:
        return ResolvedRecipe.from_yaml((self.path / "recipe.resolved.yaml").read_text(encoding="utf-8"))

    def probe(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "probe.safetensors")


def checkpoint_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Complete checkpoints, oldest first; anything without COMPLETE does not exist."""
    folder = checkpoint_folder(run_dir)
    paths = sorted(p.parent for p in folder.glob("step-*/COMPLETE")) if folder.is_dir() else []
    return [open_checkpoint(path) for path in paths]


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint by its folder.

    Raises:
        CheckpointError: there is none, it is incomplete, or another version of the format.
    """
    if not (path / "COMPLETE").is_file():
        state = "is incomplete (no COMPLETE file)" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {state}; `slt ckpt list RUN_DIR` shows the complete ones")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {manifest['format_version']}, this version reads {FORMAT_VERSION}; "
            "resume it with the release named in its manifest under versions"
        )
    return Checkpoint(path, manifest)


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The checkpoint `latest` names, or the newest complete one if a crash came before `latest` was moved."""
    found = list_checkpoints(run_dir)
    return found[-1] if found else None


def best_checkpoint(run_dir: Path) -> Checkpoint:
    """The checkpoint of the best evaluation, else the latest.

    Raises:
        CheckpointError: the run has no complete checkpoint.
    """
    pointer = checkpoint_folder(run_dir) / "best"
    if pointer.is_file():
        return open_checkpoint(checkpoint_folder(run_dir) / pointer.read_text(encoding="utf-8").strip())
    latest = latest_checkpoint(run_dir)
    if latest is None:
        raise CheckpointError(f"no complete checkpoint in {checkpoint_folder(run_dir)}; train first, or check run_dir")
    return latest


def verify(checkpoint: Checkpoint, rank: int = 0, world_size: int = 1) -> list[str]:
    """Problems in this rank's share of the parts: missing, wrong size, wrong sha256."""
    problems = []
    for name, part in sorted(checkpoint.manifest["parts"].items())[rank::world_size]:
        file = checkpoint.path / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif file.stat().st_size != part["size"]:
            problems.append(f"{file} has {file.stat().st_size} bytes, the manifest says {part['size']}")
        elif _sha256(file) != part["sha256"]:
            problems.append(f"{file} is damaged: its sha256 differs from the manifest")
    return problems


def save(engine: TrainEngine, stage: Stage, run_dir: Path, resolved: ResolvedRecipe, state: TrainState) -> Path:
    """Write one checkpoint. All ranks must call.

    Raises:
        CheckpointError: a part could not be written (full disk, permissions); earlier checkpoints are untouched.
    """
    folder = checkpoint_folder(run_dir)
    name = f"step-{state.step:06d}"
    temporary, final = folder / f".tmp-{name}", folder / name
    module = engine.module
    module.eval()
    probe = stage.probe(engine.forward)
    module.train()
    try:
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        _write_shards(engine, temporary)
        if dist.is_main():
            _write_files(temporary, resolved, state, probe)
            (temporary / "hf").mkdir()
            export_plan = stage.write_export_files(module, temporary / "hf")
            (temporary / "hf" / "export.json").write_text(json.dumps(dataclasses.asdict(export_plan)), encoding="utf-8")
        dist.barrier()
        parts = _hash_parts(temporary)
        if dist.is_main():
            manifest = {
                "format_version": FORMAT_VERSION, "step": state.step, "world_size": dist.world_size(),
                "zero_stage": resolved.ds_config["zero_optimization"]["stage"], "stage": resolved.recipe.stage,
                "versions": resolved.versions, "git_commit": resolved.git_commit, "parts": parts,
            }  # fmt: skip
            write_durably(temporary / "manifest.json", json.dumps(manifest, indent=1))
            _publish(temporary, final, folder)
        dist.barrier()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error}. Earlier checkpoints are untouched; free space or "
            "change run_dir, then start the run again: it resumes from the last complete checkpoint"
        ) from error
    return final


@contextlib.contextmanager
def failed_writes_as_os_error(what: str) -> Iterator[None]:
    """torch and safetensors report a full disk by errors of their own; inside, these become OSErrors."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"while writing {what}: {error}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _FAILED_WRITES):
            raise
        raise OSError(f"while writing {what}: {error}") from error


def _write_shards(engine: TrainEngine, folder: Path) -> None:
    frozen = bool(frozen_names(engine.module))
    with quiet_deepspeed(), failed_writes_as_os_error("the ZeRO shards"):
        engine.engine.save_checkpoint(
            str(folder), tag=TAG, client_state={}, save_latest=False, exclude_frozen_parameters=frozen
        )
        torch.save(rng_state(), folder / f"rng-rank-{dist.rank()}.pt")


def _write_files(folder: Path, resolved: ResolvedRecipe, state: TrainState, probe: dict[str, torch.Tensor]) -> None:
    (folder / "state.json").write_text(json.dumps(state.to_dict(), indent=1), encoding="utf-8")
    (folder / "recipe.resolved.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
    with failed_writes_as_os_error("probe.safetensors"):
        save_file({key: value.contiguous() for key, value in probe.items()}, folder / "probe.safetensors")


def _hash_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """Every rank syncs and hashes its share of the files; returns all of them on every rank."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    mine = {}
    for file in files[dist.rank() :: dist.world_size()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        mine[str(file.relative_to(folder))] = {"size": file.stat().st_size, "sha256": _sha256(file)}
    return {name: part for share in dist.gather_objects(mine) for name, part in share.items()}


def _publish(temporary: Path, final: Path, folder: Path) -> None:
    if final.exists():  # an earlier attempt at the same step; it is replaced only by a complete one
        shutil.rmtree(final)
    os.replace(temporary, final)
    write_durably(final / "COMPLETE", "")
    write_durably(folder / "latest", final.name)


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves either the old content or the new."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def mark_best(run_dir: Path, checkpoint: Path) -> None:
    """Point `best` at a checkpoint; only rank 0 writes."""
    if dist.is_main():
        write_durably(checkpoint_folder(run_dir) / "best", checkpoint.name)


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints and the best one; only rank 0 acts."""
    if not dist.is_main():
        return
    folder = checkpoint_folder(run_dir)
    pointer = folder / "best"
    best = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
    for old in list_checkpoints(run_dir)[:-keep]:
        if old.path.name != best:
            (old.path / "COMPLETE").unlink()  # it stops to exist before its parts go
            shutil.rmtree(old.path)
    for leftover in folder.glob(".tmp-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def load(engine: TrainEngine, checkpoint: Checkpoint, universal: Path | None) -> TrainState:
    """Verify on all ranks, then load weights, optimizer and RNG. All ranks must call.

    Args:
        universal: converted copy to load from when the world size changed (`pipeline.engine.reshard`).

    Raises:
        CheckpointError: parts are missing or damaged (every rank raises, none hangs).
    """
    shares = dist.gather_objects(verify(checkpoint, dist.rank(), dist.world_size()))
    problems = [problem for share in shares for problem in share]
    if problems:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is damaged:\n  " + "\n  ".join(problems)
            + "\n  fix: remove that folder to resume from the one before"
        )  # fmt: skip
    frozen = bool(frozen_names(engine.module))
    source, tag = (checkpoint.path, TAG) if universal is None else (universal, universal_tag(checkpoint))
    with quiet_deepspeed():
        path, _ = engine.engine.load_checkpoint(str(source), tag=tag, load_module_strict=not frozen)
    if universal is not None:
        _unshare_step_counts(engine)
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {source}/{tag}")
    rng = checkpoint.path / f"rng-rank-{dist.rank()}.pt"
    if universal is None:
        restore_rng(torch.load(rng, weights_only=True))
    return checkpoint.state()


def _unshare_step_counts(engine: TrainEngine) -> None:
    """DeepSpeed 0.19.8 loads one `step` tensor from a universal checkpoint into every parameter group under ZeRO-3,
    and torch's AdamW counts in place: with two groups it would advance by two per step."""
    for state in engine.engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def universal_tag(checkpoint: Checkpoint) -> str:
    return f"{TAG}-{checkpoint.path.name}"
