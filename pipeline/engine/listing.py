"""What a run folder holds, in words: its checkpoints, and what else lies beside them."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.engine.checkpoint import (
    Checkpoint,
    best_name,
    checkpoint_folder,
    complete_folders,
    open_checkpoint,
    verify,
)
from pipeline.engine.saving.publish import COMPLETE
from pipeline.errors import CheckpointError, DamagedCheckpointError, ForeignCheckpointError

_BESIDE = {
    ".tmp-step-*": "unfinished: being written, or left by a crash; the next start removes it",
    "damaged-step-*": "set aside because it is damaged",
    "foreign-step-*": "set aside: of another format version, under a name that the run needed",
}
_UNITS = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))


def listing(run_dir: Path) -> list[str]:
    """A line per checkpoint, oldest first, then one per folder beside them. Reads manifests and sizes, no weights."""
    best = best_name(run_dir)
    lines = [_line(path, best) for path in complete_folders(run_dir)]
    for pattern, words in _BESIDE.items():
        lines += [f"{path}  {words}" for path in sorted(checkpoint_folder(run_dir).glob(pattern))]
    return lines


def _line(path: Path, best: str) -> str:
    try:
        checkpoint = open_checkpoint(path)
    except ForeignCheckpointError as error:
        return f"{path}  SKIPPED {str(error).removeprefix(f'{path}: ')}"
    except DamagedCheckpointError as error:
        return f"{path}  DAMAGED {error}"
    manifest = checkpoint.manifest
    size = sum(part["size"] for part in manifest["parts"].values())
    saved = manifest.get("time") or (path / COMPLETE).stat().st_mtime  # earlier releases did not note it
    words = [
        str(path), f"step {checkpoint.step}", f"{checkpoint.world_size} ranks",
        f"ZeRO-{manifest.get('zero_stage', '?')}", f"{size / 1e6:.1f} MB", f"{age(time.time() - saved)} old",
    ]  # fmt: skip
    if path.name == best:
        words.append("best")
    if wrong := _wrong_sizes(checkpoint):
        words.append(f"DAMAGED {', '.join(wrong)}: missing or of another size")
    return "  ".join(words)


def _wrong_sizes(checkpoint: Checkpoint) -> list[str]:
    files = {name: checkpoint.path / name for name in checkpoint.manifest["parts"]}
    sizes = {name: file.stat().st_size if file.is_file() else -1 for name, file in files.items()}
    return [name for name, part in checkpoint.manifest["parts"].items() if sizes[name] != part["size"]]


def age(seconds: float) -> str:
    """In the largest unit of which there is one."""
    size, unit = next((unit for unit in _UNITS if seconds >= unit[0]), _UNITS[-1])
    return f"{max(seconds, 0) // size:.0f} {unit}"


def verified(path: Path) -> tuple[list[str], list[str]]:
    """Every byte of one checkpoint, or of all of a run folder: a line each, and the problems.

    Raises:
        CheckpointError: there is none.
    """
    run = complete_folders(path)
    folders = run or [path]
    if not run and not (path / COMPLETE).is_file():
        raise CheckpointError(
            f"{path} is no complete checkpoint and holds none in {checkpoint_folder(path)}; `slt ckpt list RUN_DIR` "
            "shows the complete ones"
        )
    lines, problems = [], []
    for folder in folders:
        try:
            checkpoint = open_checkpoint(folder)
            found = verify(checkpoint)
            words = f"{len(checkpoint.manifest['parts'])} files, " + (f"{len(found)} DAMAGED" if found else "intact")
        except ForeignCheckpointError as error:
            found, words = [], f"SKIPPED {str(error).removeprefix(f'{folder}: ')}"
        except DamagedCheckpointError as error:
            found, words = [str(error)], "DAMAGED manifest"
        lines.append(f"{folder}  {words}")
        problems += found
    return lines, problems
