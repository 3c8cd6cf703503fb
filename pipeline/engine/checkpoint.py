"""Checkpoints that are complete or do not exist.

``run_dir/checkpoints/step-000100/`` holds ``deepspeed/`` (ZeRO shards), ``rng-rank-N.pt``, ``state.json``,
``recipe.resolved.yaml``, ``probe.safetensors`` (live outputs, the oracle of the export), ``manifest.json`` (size and
sha256 of every part, versions, world size) and, written last, ``COMPLETE`` with the manifest's sha256. The newest one
is the one with the highest step; no pointer file says so. ``checkpoints/best`` names the one with the best evaluation.
A checkpoint is written to a temporary folder first, so a crash at any moment leaves the previous checkpoint untouched.
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
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from pipeline import dist
from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.durable import failed_writes_as_os_error, sha256_of, write_durably
from pipeline.engine.publish import COMPLETE, publish, remove_leftovers, temporary_folder
from pipeline.engine.setup import TrainEngine, quiet_deepspeed
from pipeline.engine.state import TrainState, restore_rng, rng_state
from pipeline.errors import CheckpointError, DamagedCheckpointError
from pipeline.stages.base import AnyStage
from pipeline.stages.freezing import frozen_names

logger = logging.getLogger(__name__)

TAG = "deepspeed"
FORMAT_VERSION = 1
Damaged = Literal["fall_back", "stop"]

_STEP_FOLDER = re.compile(r"step-(\d+)")


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


def complete_folders(run_dir: Path) -> list[Path]:
    """Folders of the complete checkpoints by rising step as a number: step-1000000 follows step-999900."""
    named = ((_STEP_FOLDER.fullmatch(path.name), path) for path in checkpoint_folder(run_dir).glob("step-*"))
    steps = [(int(match[1]), path) for match, path in named if match and (path / COMPLETE).is_file()]
    return [path for _, path in sorted(steps)]


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Complete checkpoints that this version reads, oldest first; the log names any other."""
    checkpoints = []
    for path in complete_folders(run_dir):
        try:
            checkpoints.append(open_checkpoint(path))
        except CheckpointError as error:
            logger.warning("not listed: %s", error)
    return checkpoints


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint by its folder; its parts are not read, see `verify`.

    Raises:
        CheckpointError: it is absent, incomplete, or of another format version.
        DamagedCheckpointError: its manifest is damaged.
    """
    if not (path / COMPLETE).is_file():
        state = "is incomplete (no COMPLETE file)" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {state}; `slt ckpt list RUN_DIR` shows the complete ones")
    try:
        text = (path / "manifest.json").read_bytes()
        expected = (path / COMPLETE).read_text(encoding="utf-8").strip()
        manifest = json.loads(text)
        version, parts = manifest["format_version"], manifest.get("parts", {})
        whole = isinstance(version, int) and all({"size", "sha256"} <= part.keys() for part in parts.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path / 'manifest.json'} is damaged: {error!r}") from error
    # checkpoints of earlier releases have an empty COMPLETE
    if not whole or (expected and hashlib.sha256(text).hexdigest() != expected):
        raise DamagedCheckpointError(f"{path / 'manifest.json'} is damaged: its sha256 differs from COMPLETE")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {version}, this version reads {FORMAT_VERSION}; "
            "resume it with the release named in its manifest under versions"
        )
    return Checkpoint(path, manifest)


def latest_checkpoint(run_dir: Path, damaged: Damaged | None = None) -> Checkpoint | None:
    """The newest checkpoint with every byte as written; None if no complete one exists.

    All ranks must call: they verify together.

    Args:
        damaged: what to do when a newer one is damaged; None = as the run's recipe says.

    Raises:
        DamagedCheckpointError: it is damaged and `damaged` is `stop`, or no complete checkpoint is intact.
        CheckpointError: it is of another format version.
    """
    return _first_intact(complete_folders(run_dir)[::-1], damaged)


def best_checkpoint(run_dir: Path) -> Checkpoint:
    """The checkpoint with the best evaluation, else the latest; verified as in `latest_checkpoint`.

    Raises:
        CheckpointError: the run has no complete checkpoint.
    """
    folders = complete_folders(run_dir)[::-1]
    name = best_name(run_dir)
    best = [path for path in folders if path.name == name]
    if name and not best:
        logger.error("%s: the best checkpoint %s does not exist; using the newest", run_dir, name)
    checkpoint = _first_intact(best + [path for path in folders if path not in best], None)
    if checkpoint is None:
        raise CheckpointError(f"no complete checkpoint in {checkpoint_folder(run_dir)}; train first, or check run_dir")
    return checkpoint


def best_name(run_dir: Path) -> str:
    """Folder name of the checkpoint with the best evaluation; empty before there is one."""
    pointer = checkpoint_folder(run_dir) / "best"
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""


def _first_intact(folders: list[Path], damaged: Damaged | None) -> Checkpoint | None:
    """The first folder without damage; skipped ones are logged as errors, or raise."""
    damages: list[str] = []
    for folder in folders:
        problems = damage(folder)
        if problems:
            damages.append("\n  ".join([f"checkpoint {folder} is damaged:", *problems]))
            continue
        checkpoint = open_checkpoint(folder)
        if damages and (damaged or checkpoint.resolved().recipe.train.checkpoint.damaged) == "stop":
            raise DamagedCheckpointError(
                "\n".join(damages) + f"\n  {folder} is intact, but train.checkpoint.damaged is `stop`; "
                "fix: restore the damaged files, or remove the damaged checkpoint"
            )
        if damages and dist.is_main():
            logger.error("%s\n  FALLING BACK to %s, which is intact", "\n".join(damages), folder)
        return checkpoint
    if damages:
        raise DamagedCheckpointError(
            "\n".join(damages) + "\n  no complete checkpoint is intact; fix: restore the files from a copy, or choose "
            "another run_dir to start from step 0"
        )
    return None


def damage(folder: Path) -> list[str]:
    """Problems of a complete checkpoint, equal on all ranks, which check it together. All must call.

    Raises:
        CheckpointError: it is incomplete or of another format version.
    """
    try:
        problems = verify(open_checkpoint(folder), dist.rank(), dist.world_size())
    except DamagedCheckpointError as error:
        problems = [str(error)]
    return list(dict.fromkeys(problem for share in dist.gather_objects(problems) for problem in share))


def verify(checkpoint: Checkpoint, rank: int = 0, world_size: int = 1) -> list[str]:
    """Problems in this rank's share of the parts: missing, unreadable, wrong size, wrong sha256."""
    parts = sorted(checkpoint.manifest["parts"].items())[rank::world_size]
    return [problem for name, part in parts if (problem := _part_problem(checkpoint.path / name, part))]


def _part_problem(file: Path, part: dict[str, Any]) -> str:
    try:
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != part["size"]:
            return f"{file} has {file.stat().st_size} bytes, the manifest says {part['size']}"
        return "" if sha256_of(file) == part["sha256"] else f"{file} is damaged: its sha256 differs from the manifest"
    except OSError as error:  # a broken disk
        return f"{file} cannot be read: {error.strerror}"


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


def mark_best(run_dir: Path, checkpoint: Path) -> None:
    """Point `best` at a checkpoint; only rank 0 writes."""
    if dist.is_main():
        write_durably(checkpoint_folder(run_dir) / "best", checkpoint.name)


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints and the best one; only rank 0 acts."""
    if not dist.is_main():
        return
    folder, best = checkpoint_folder(run_dir), best_name(run_dir)
    for old in complete_folders(run_dir)[:-keep]:
        if old.name != best:
            (old / COMPLETE).unlink()  # no longer a checkpoint, before its parts go
            shutil.rmtree(old)
            shutil.rmtree(universal_folder(old), ignore_errors=True)
    remove_leftovers(folder)


def set_damaged_aside(run_dir: Path, resumed: Checkpoint) -> None:
    """Rename checkpoints newer than the resumed one; only rank 0 acts.

    They were skipped because they are damaged. Under their own names they would count among the newest ones that
    `prune` keeps, in place of intact ones.
    """
    if not dist.is_main():
        return
    for path in complete_folders(run_dir):
        if int(path.name.removeprefix("step-")) > resumed.step:
            names = (
                path.with_name(f"damaged-{path.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 99)))
            )
            path.rename(next(name for name in names if not name.exists()))


def load(engine: TrainEngine, checkpoint: Checkpoint, universal: Path | None) -> TrainState:
    """Load weights, optimizer and RNG from a checkpoint that was verified when chosen. All ranks must call.

    Args:
        universal: converted copy to load from when the world size changed (`pipeline.engine.reshard`).

    Raises:
        CheckpointError: DeepSpeed finds nothing to load.
    """
    frozen = bool(frozen_names(engine.module))
    source, tag = (checkpoint.path, TAG) if universal is None else (universal, universal_tag(checkpoint))
    with quiet_deepspeed():
        path, _ = engine.engine.load_checkpoint(str(source), tag=tag, load_module_strict=not frozen)
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {source}/{tag}")
    _renew_adam(engine.engine.optimizer)
    rng = checkpoint.path / f"rng-rank-{dist.rank()}.pt"
    if universal is None:
        restore_rng(torch.load(rng, weights_only=True))
    return checkpoint.state()


def _renew_adam(wrapper: Any) -> None:
    """Each state's own count of steps, where its weights are; the fused kernel, whatever the run that saved used.

    DeepSpeed 0.19.8 loads one `step` tensor from a universal checkpoint into every parameter group under ZeRO-3, and
    torch's AdamW counts in place: with two groups it would advance by two per step.
    """
    optimizer = getattr(wrapper, "optimizer", wrapper)
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone().to(parameter.device)
    for group in optimizer.param_groups:
        group["fused"] = True


def universal_tag(checkpoint: Checkpoint) -> str:
    return f"{TAG}-{checkpoint.path.name}"


def universal_folder(path: Path) -> Path:
    """Where a checkpoint's copy for other world sizes is."""
    return path.parent / f".universal-{path.name}"
