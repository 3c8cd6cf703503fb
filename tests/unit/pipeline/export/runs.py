"""Finished runs made by hand: a complete checkpoint without an engine behind it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.config.load import load_recipe
from pipeline.config.resolve import ResolvedRecipe, resolve
from pipeline.engine.checkpoint import Checkpoint, open_checkpoint
from pipeline.engine.state import TrainState

EXPORT_PLAN: dict[str, Any] = {"prefix": "", "tied": [], "frozen": []}


def recipe_of(stage: str, *sets: str) -> ResolvedRecipe:
    return resolve(load_recipe(f"demo_{stage}", ["train.world_sizes=[2]", *sets]), 2)


def finished_run(
    run_dir: Path,
    resolved: ResolvedRecipe,
    step: int = 5,
    probe: dict[str, torch.Tensor] | None = None,
    plan: dict[str, Any] = EXPORT_PLAN,
) -> Checkpoint:
    """A complete checkpoint of ``resolved`` with the small files of an export and the live model's outputs."""
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    (folder / "hf").mkdir(parents=True)
    (folder / "hf" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "hf" / "export.json").write_text(json.dumps(plan))
    (folder / "state.json").write_text(json.dumps(TrainState(step=step, data={"fingerprint": "f00d"}).to_dict()))
    (folder / "recipe.resolved.yaml").write_text(resolved.to_yaml())
    save_file(probe or {"logits": torch.zeros(1)}, folder / "probe.safetensors")
    parts = {
        str(file.relative_to(folder)): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in folder.rglob("*")
        if file.is_file()
    }
    manifest = {"format_version": 1, "step": step, "world_size": 2, "parts": parts}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "COMPLETE").touch()
    return open_checkpoint(folder)
