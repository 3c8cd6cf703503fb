"""A finished run -> a Hugging Face folder: safetensors, config, tokenizer, processor, generation config, model card.

The checkpoint carries the small files (``hf/``, written by the stage when it was saved), so an export needs neither
the hub nor the engine. Frozen parts are read from the recipe's source folders.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.checkpoint import Checkpoint, best_checkpoint, damage, latest_checkpoint, open_checkpoint
from pipeline.errors import CheckpointError, DamagedCheckpointError
from pipeline.export.card import write_card
from pipeline.export.gather import iterate_tensors, write_safetensors
from pipeline.export.verify import verify_export

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 4 * 1024**3


def find_checkpoint(source: Path, which: str) -> Checkpoint:
    """A checkpoint folder itself, or the ``best`` or ``latest`` of a run folder, with every byte verified.

    In a run folder, the newest intact one replaces a damaged one, with a message, unless the run's recipe says
    otherwise; a checkpoint folder is never replaced.

    Raises:
        CheckpointError: nothing complete there.
        DamagedCheckpointError: nothing intact there.
    """
    if re.fullmatch(r"step-\d+", source.name) or (source / "manifest.json").is_file():
        problems = damage(source)
        if problems:
            raise DamagedCheckpointError(f"checkpoint {source} is damaged:\n  " + "\n  ".join(problems))
        return open_checkpoint(source)
    if which == "best":
        return best_checkpoint(source)
    checkpoint = latest_checkpoint(source)
    if checkpoint is None:
        raise CheckpointError(f"no complete checkpoint in {source}/checkpoints; train first, or check the path")
    return checkpoint


def export(
    source: Path, out: Path, which: str = "best", check: bool = True, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, float]:
    """Export a run's checkpoint to ``out`` (complete or absent) and compare it with the live model's outputs.

    Returns:
        Largest absolute difference per compared output, empty without ``check``.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or the exported model does not equal the live one.
    """
    checkpoint = find_checkpoint(source, which)
    resolved = checkpoint.resolved()
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        shutil.copytree(checkpoint.path / "hf", temporary, dirs_exist_ok=True)
        _write_weights(checkpoint, resolved, temporary, max_shard_bytes)
        differences = verify_export(temporary, checkpoint, resolved) if check else {}
        write_card(temporary, checkpoint, resolved, source, differences)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"export to {out} could not be written: {error}; nothing was left behind") from error
    except CheckpointError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if out.exists():
        shutil.rmtree(out)
    os.replace(temporary, out)
    logger.info("exported %s to %s", checkpoint.path, out)
    return differences


def export_dtype(resolved: ResolvedRecipe) -> torch.dtype:
    return torch.bfloat16 if resolved.recipe.train.precision == "bf16" else torch.float32


def _write_weights(checkpoint: Checkpoint, resolved: ResolvedRecipe, folder: Path, max_shard_bytes: int) -> None:
    plan = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    dtype = export_dtype(resolved)
    skipped = set(plan["tied"])
    heads: dict[str, torch.Tensor] = {}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in iterate_tensors(checkpoint, dtype):
            if not name.startswith(plan["prefix"]):
                heads[name] = tensor
            elif name.removeprefix(plan["prefix"]) not in skipped:
                yield name.removeprefix(plan["prefix"]), tensor
        yield from _frozen(resolved, plan, dtype, skipped)

    write_safetensors(tensors(), folder, max_shard_bytes)
    if heads:
        write_safetensors(iter(heads.items()), folder, max_shard_bytes, stem="heads")
    (folder / "export.json").unlink()


def _frozen(
    resolved: ResolvedRecipe, plan: dict[str, Any], dtype: torch.dtype, skipped: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters the stage froze, from the recipe's source folders."""
    from pipeline.models.registry import build_visual, load_llm

    llm, visual = resolved.recipe.model.llm, resolved.recipe.model.visual
    missing = set(plan["frozen"]) - {plan["prefix"] + name for name in skipped}
    loaders: dict[str, Callable[[], Any]] = {}
    if llm is not None:
        loaders["llm"] = lambda: load_llm(llm, dtype)
    if visual is not None:
        loaders["visual"] = lambda: build_visual(visual, resolved.recipe.data.image_pixels, dtype)
    for part, load in loaders.items():
        if any(name.startswith(f"{part}.") for name in missing):
            for name, tensor in load().state_dict().items():
                if f"{part}.{name}" in missing:
                    exported = f"{part}.{name}".removeprefix(plan["prefix"])
                    yield exported, tensor.to(dtype) if tensor.is_floating_point() else tensor
                    missing.discard(f"{part}.{name}")
    if missing:
        raise CheckpointError(
            f"{len(missing)} frozen parameters were not found where the recipe loads them from, first "
            f"{sorted(missing)[0]}; the source folders changed since training"
        )
