"""What an export of a checkpoint holds, decided before a byte of it is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine.checkpoint import Checkpoint
from pipeline.engine.durable import sha256_of
from pipeline.export.entry import Entry
from pipeline.export.frozen import check_sources, frozen_entries
from pipeline.export.gather import checkpoint_entries
from pipeline.export.lora import Adapters, bases_of, check_kept, config_without_adapters
from pipeline.export.mapped import MappedFiles
from pipeline.export.safetensors_file import plan_files
from pipeline.export.weights import Weights

Lora = Literal["merge", "keep"]
"""What becomes of adapters."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Weights and small files of one export."""

    checkpoint: Checkpoint
    resolved: ResolvedRecipe
    config: dict[str, Any]
    """``config.json`` as exported."""
    weights: Weights
    adapters: Adapters
    """Those that were not merged."""
    sources: dict[str, Path]
    """Part -> folder that its frozen parameters come from."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, max_shard_bytes: int, lora: Lora) -> Contents:
        """Raises CheckpointError as the parts do: changed sources, missing tensors, nothing to keep."""
        resolved = checkpoint.resolved()
        plan, config = (_read(checkpoint.path / "hf" / name) for name in ("export.json", "config.json"))
        sources = check_sources(resolved, plan)
        dtype = export_dtype(resolved)
        entries = [*checkpoint_entries(checkpoint, dtype), *frozen_entries(resolved, plan, dtype, sources)]
        model, heads = _named_as_exported(entries, plan)
        adapters = Adapters.of([*model, *heads], config, plan, bases_of(resolved.recipe.model, plan))
        heads = adapters.merge(heads)
        if lora == "keep":
            check_kept(adapters)
            # a plain language model's config has no place for them: its own files hold it as it was
            model = adapters.without(model) if plan["prefix"] == "llm." else model
        elif adapters.halves:
            model, config = adapters.merge(model), config_without_adapters(config)
            adapters = replace(adapters, halves={})
        others = [*(plan_files(heads, max_shard_bytes, "heads") if heads else []), *adapters.files()]
        weights = Weights(plan_files(model, max_shard_bytes), others)
        return cls(checkpoint, resolved, config, weights, adapters, sources)

    def identity(self) -> dict[str, Any]:
        """All that decides the bytes of the weight files."""
        return {
            "checkpoint": sha256_of(self.checkpoint.path / "manifest.json"), "config": self.config,
            "files": self.weights.described(),
        }  # fmt: skip

    def mapped(self) -> MappedFiles:
        """The files that the frozen tensors are mapped from."""
        return MappedFiles(self.sources.values())

    def write_small_files(self, folder: Path) -> None:
        """Everything but the weights and the card."""
        shutil.copytree(self.checkpoint.path / "hf", folder, dirs_exist_ok=True)
        (folder / "export.json").unlink()
        if self.config != _read(folder / "config.json"):
            text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
        self.adapters.write_configs(folder)


def export_dtype(resolved: ResolvedRecipe) -> torch.dtype:
    """Floats of an export."""
    return torch.bfloat16 if resolved.recipe.train.precision == "bf16" else torch.float32


def _named_as_exported(entries: Iterable[Entry], plan: dict[str, Any]) -> tuple[list[Entry], list[Entry]]:
    """The model's tensors without the stage's prefix and without tied ones, and the stage's own heads."""
    model, heads, prefix = list[Entry](), list[Entry](), plan["prefix"]
    for entry in entries:
        name = entry.name.removeprefix(prefix)
        if not entry.name.startswith(prefix):
            heads.append(entry)
        elif name not in plan["tied"]:
            model.append(replace(entry, name=name))
    return model, heads


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
