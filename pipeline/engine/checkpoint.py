"""Checkpoints that are complete or do not exist.

``run_dir/checkpoints/step-000100/`` holds ``deepspeed/`` (ZeRO shards), ``rng-rank-N.pt``, ``state.json``,
``recipe.resolved.yaml``, ``manifest.json`` (size and sha256 of every part, versions, world size) and, written last,
``COMPLETE`` with the manifest's sha256. The best one, the last one and one before a stop also hold
``probe.safetensors``: live outputs, the oracle of the export. The newest checkpoint is the one with the highest step;
no pointer file says so. ``checkpoints/best`` names the one with the best evaluation.
A checkpoint is written to a temporary folder first, so a crash at any moment leaves the previous checkpoint untouched.
DeepSpeed's own `latest` and tags are not used: it writes them before all ranks are done, and torch.load does not
notice flipped bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from pipeline import dist
from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.durable import sha256_of
from pipeline.engine.elastic import layout_of, load_elastically, renew_adam
from pipeline.engine.saving.publish import COMPLETE
from pipeline.engine.setup import TrainEngine, quiet_deepspeed
from pipeline.engine.state import TrainState, restore_rng
from pipeline.engine.zero_shards import ZeroShards
from pipeline.errors import CheckpointError, DamagedCheckpointError, ForeignCheckpointError
from pipeline.stages.freezing import frozen_names

logger = logging.getLogger(__name__)

TAG = "deepspeed"
FORMAT_VERSION = 1
_FILES_AT_ONCE = 4
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

    @property
    def mean_of(self) -> list[str]:
        """Names of the checkpoints it is the mean of; empty for one that a run has saved."""
        return list(self.manifest.get("mean_of", []))

    def state(self) -> TrainState:
        return TrainState.from_dict(json.loads((self.path / "state.json").read_text(encoding="utf-8")))

    def resolved(self) -> ResolvedRecipe:
        return ResolvedRecipe.from_yaml((self.path / "recipe.resolved.yaml").read_text(encoding="utf-8"))

    def export_plan(self) -> dict[str, Any]:
        """The `pipeline.stages.base.ExportPlan` of the run, as plain values."""
        plan: dict[str, Any] = json.loads((self.path / "hf" / "export.json").read_text(encoding="utf-8"))
        return plan

    def probe(self) -> dict[str, torch.Tensor]:
        """The live model's outputs and their inputs.

        Raises:
            CheckpointError: it was saved without them.
        """
        if self.mean_of:
            raise CheckpointError(
                f"{self.path} is a mean of checkpoints, with which no live model has computed: there is nothing to "
                "compare an export with; export it with --no-verify, and evaluate it with `slt evaluate`"
            )
        if not (self.path / "probe.safetensors").is_file():
            raise CheckpointError(
                f"{self.path} was saved amid training, without outputs of the live model to compare an export with: "
                "only the best checkpoint, the last one and one before a stop hold them. Start the run again (stop it "
                "after a step, and it saves one), choose another checkpoint, or export this one with --no-verify"
            )
        return load_file(self.path / "probe.safetensors")


def checkpoint_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def complete_folders(run_dir: Path) -> list[Path]:
    """Folders of the complete checkpoints by rising step as a number: step-1000000 follows step-999900."""
    found = [path for path in checkpoint_folder(run_dir).glob("step-*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted((path for path in found if (path / COMPLETE).is_file()), key=step_of)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


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
        CheckpointError: it is absent or incomplete.
        ForeignCheckpointError: it is of another format version.
        DamagedCheckpointError: its manifest is damaged.
    """
    if not (path / COMPLETE).is_file():
        state = "is incomplete (no COMPLETE file)" if path.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {path} {state}; `slt ckpt list RUN_DIR` shows the complete ones")
    try:
        text = (path / "manifest.json").read_bytes()
        expected = (path / COMPLETE).read_text(encoding="utf-8").strip()
        manifest = json.loads(text)
        version = manifest["format_version"]
        parts = manifest["parts"].values() if version == FORMAT_VERSION else ()
        whole = isinstance(version, int) and all({"size", "sha256"} <= part.keys() for part in parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path / 'manifest.json'} is damaged: {error!r}") from error
    if whole and version != FORMAT_VERSION:  # before its sum is compared: another format may have another rule
        raise ForeignCheckpointError(
            f"{path}: checkpoint format {version}, this version reads {FORMAT_VERSION}; "
            "resume it with the release named in its manifest under versions"
        )
    # checkpoints of earlier releases have an empty COMPLETE
    if not whole or (expected and hashlib.sha256(text).hexdigest() != expected):
        raise DamagedCheckpointError(f"{path / 'manifest.json'} is damaged: its sha256 differs from COMPLETE")
    return Checkpoint(path, manifest)


def is_foreign(path: Path) -> bool:
    """Whether a complete checkpoint is of another format version: such ones are skipped, and never removed."""
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        return isinstance(error, ForeignCheckpointError)
    return False


def own_folders(run_dir: Path) -> list[Path]:
    """As `complete_folders`, without those of another format version."""
    return [path for path in complete_folders(run_dir) if not is_foreign(path)]


def listed_for_all(folders: Callable[[Path], list[Path]], run_dir: Path) -> list[Path]:
    """What rank 0 lists, on every rank: a network disk shows hosts a renamed folder at different times. All ranks must
    call."""
    return list(dist.broadcast_object(folders(run_dir) if dist.is_main() else []))


def latest_checkpoint(run_dir: Path, damaged: Damaged | None = None) -> Checkpoint | None:
    """The newest checkpoint with every byte as written; None if no complete one of this format exists.

    All ranks must call: they verify together. Checkpoints of another format version are skipped, with an error in the
    log.

    Args:
        damaged: what to do when a newer one is damaged; None = as the run's recipe says.

    Raises:
        DamagedCheckpointError: it is damaged and `damaged` is `stop`, or no complete checkpoint is intact.
    """
    return _first_intact(listed_for_all(complete_folders, run_dir)[::-1], damaged)


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
        try:
            problems = damage(folder)
        except ForeignCheckpointError as error:
            if dist.is_main():
                logger.error("SKIPPED %s", error)
            continue
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
        CheckpointError: it is incomplete.
        ForeignCheckpointError: it is of another format version.
    """
    try:
        problems = verify(open_checkpoint(folder), dist.rank(), dist.world_size())
    except DamagedCheckpointError as error:
        problems = [str(error)]
    return list(dict.fromkeys(problem for share in dist.gather_objects(problems) for problem in share))


def verify(checkpoint: Checkpoint, rank: int = 0, world_size: int = 1) -> list[str]:
    """Problems in this rank's share of the parts: missing, unreadable, wrong size, wrong sha256."""
    parts = sorted(checkpoint.manifest["parts"].items())[rank::world_size]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:  # reading and hashing let other threads run
        problems = pool.map(lambda item: _part_problem(checkpoint.path / item[0], item[1]), parts)
        return [problem for problem in problems if problem]


def _part_problem(file: Path, part: dict[str, Any]) -> str:
    try:
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != part["size"]:
            return f"{file} has {file.stat().st_size} bytes, the manifest says {part['size']}"
        return "" if sha256_of(file) == part["sha256"] else f"{file} is damaged: its sha256 differs from the manifest"
    except OSError as error:  # a broken disk
        return f"{file} cannot be read: {error.strerror}"


def load(engine: TrainEngine, checkpoint: Checkpoint) -> TrainState:
    """Weights, optimizer and RNG from a checkpoint that was verified when chosen, whatever world size and ZeRO stage
    saved it. All ranks must call.

    At another world size the ranks keep the random numbers they have.

    Raises:
        CheckpointError: the shards do not hold what the engine trains, or DeepSpeed finds nothing to load.
    """
    folder, deepspeed = checkpoint.path / TAG, engine.engine
    own_files = deepspeed.zero_nvme_offload_optimizer() and checkpoint.world_size == dist.world_size()
    shards = None if own_files else ZeroShards.open(folder)
    if shards is None or shards.layout == layout_of(deepspeed):
        frozen = bool(frozen_names(engine.module))
        with quiet_deepspeed():
            path, _ = deepspeed.load_checkpoint(str(checkpoint.path), tag=TAG, load_module_strict=not frozen)
        if path is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {folder}")
    else:
        load_elastically(deepspeed, shards)
    renew_adam(deepspeed.optimizer)
    if checkpoint.world_size == dist.world_size():
        restore_rng(torch.load(checkpoint.path / f"rng-rank-{dist.rank()}.pt", weights_only=True))
    elif dist.is_main():
        logger.info("%s: its %d ranks' random numbers end here", checkpoint.path, checkpoint.world_size)
    return checkpoint.state()


def universal_tag(checkpoint: Checkpoint) -> str:
    return f"{TAG}-{checkpoint.path.name}"


def universal_folder(path: Path) -> Path:
    """Where a checkpoint's copy for other world sizes is."""
    return path.parent / f".universal-{path.name}"
