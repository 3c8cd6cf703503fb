"""Whether the run directory can be written and its disk has room for the checkpoints: known before anything starts."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.schema import Recipe
from pipeline.config.source import Problem

_GIB = 1024**3
_STATE_BYTES = 12
"""Per trained weight in a checkpoint at least: its master copy and both moments of AdamW in fp32. ZeRO-3 writes no
more; other stages also write the weight itself."""


def room_problems(recipe: Recipe) -> Iterator[Problem]:
    """A run directory that cannot be written, or that is too small for what `train.checkpoint` keeps there."""
    run_dir = Path(recipe.run_dir)
    there = existing_parent(run_dir)
    if not there.is_dir():
        yield Problem(f"run_dir={recipe.run_dir}: {there} is a file; choose another folder", ("run_dir",))
    elif not os.access(there, os.W_OK | os.X_OK):
        text = f"run_dir={recipe.run_dir}: {there} cannot be written by this user; choose another folder"
        yield Problem(text, ("run_dir",))
    elif text := _too_small(recipe, there, bytes_below(run_dir / "checkpoints")):
        yield Problem(text, ("run_dir", "train.checkpoint.keep"))


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _too_small(recipe: Recipe, there: Path, held: int) -> str:
    """What is wrong with the free space, given the bytes that earlier checkpoints hold and will give up."""
    keep, one = recipe.train.checkpoint, checkpoint_bytes(recipe)
    # a new checkpoint is complete before the oldest goes
    count = keep.keep + 1 if keep.every_steps or keep.every_minutes else 1
    free = shutil.disk_usage(there).free
    if free + held >= one * count:
        return ""
    return (
        f"run_dir={recipe.run_dir}: its disk has {(free + held) / _GIB:.1f} GiB for checkpoints, but {count} of about "
        f"{one / _GIB:.1f} GiB must fit (train.checkpoint.keep={keep.keep}, and one being written); free space, lower"
        " train.checkpoint.keep, or choose another run_dir"
    )


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of the training state in one checkpoint at least: only weights that files state are counted."""
    return _trained_weights(recipe) * _STATE_BYTES


def _trained_weights(recipe: Recipe) -> int:
    """Weights with an optimizer state that come from a folder of this machine; small new parts are left out."""
    model = recipe.model
    if any(part.mode != "trained" for part in recipe.train.parts.values()):  # how much of a part, only its model tells
        return 0
    if recipe.stage == "continued_pretraining" and model.llm is not None and model.llm.path is not None:
        return weights_in(Path(model.llm.path))
    backbone = model.visual.backbone if model.visual is not None else None
    if recipe.stage == "contrastive" and backbone is not None and backbone.path is not None:
        return weights_in(Path(backbone.path)) if backbone.train == "full" else 0
    return 0


def weights_in(folder: Path) -> int:
    """Weights in the safetensors files of a folder, from their headers; 0 if it holds none."""
    return sum(_weights_of(file) for file in folder.glob("model*.safetensors"))


def _weights_of(file: Path) -> int:
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(min(length, file.stat().st_size)))
    except (OSError, ValueError):  # the model's loader says what is wrong with it
        return 0
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if there is none. What vanishes meanwhile, because another run saves there,
    does not count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


__all__ = ["bytes_below", "checkpoint_bytes", "existing_parent", "room_problems", "weights_in"]
