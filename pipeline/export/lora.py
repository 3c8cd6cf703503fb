"""Adapters (LoRA, arXiv 2106.09685) of an export: kept as the run trained them, or added to the weights they adapt.

Kept, they stay in the model's own files, and are also written alone as a folder that PEFT reads.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import CheckpointError
from pipeline.export.entry import Entry
from pipeline.export.safetensors_file import PlannedFile

ADAPTER_FOLDER = "backbone_adapter"

_ADAPTER = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])\.default\.weight")
_IN_BACKBONE = re.compile(r"(?:visual\.)?backbone\.model\.(?P<layer>.+)")


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters among the tensors of an export."""

    halves: dict[tuple[str, str], Entry]
    """Layer, and A (down) or B (up) -> its weight."""
    rank: int
    alpha: float
    base: str | None
    """Folder or hub id of the backbone that they adapt; None if no folder holds it alone."""

    @classmethod
    def of(cls, entries: Iterable[Entry], config: dict[str, Any], base: str | None) -> Adapters:
        """Those of a model with this ``config.json``; it may have none."""
        matched = ((_ADAPTER.fullmatch(entry.name), entry) for entry in entries)
        encoder = _encoder(config)
        return cls(
            {(match["layer"], match["half"]): entry for match, entry in matched if match is not None},
            int(encoder.get("lora_rank", 0)),
            float(encoder.get("lora_alpha", 0.0)),
            base,
        )

    def merge(self, entries: Iterable[Entry]) -> list[Entry]:
        """The same model without adapters: each is added to its layer when that is written.

        Sums are computed in float32 from the layer's weight as the live model holds it.

        Raises:
            CheckpointError: the model has no adapters.
        """
        if not self.halves:
            raise CheckpointError("the model has no LoRA adapters to merge; leave out --merge-lora")
        kept = []
        for entry in entries:
            layer, _, parameter = entry.name.rpartition(".base_layer.")
            if layer:
                plain = replace(entry, name=f"{layer}.{parameter}")
                kept.append(self._added(plain, layer) if parameter == "weight" else plain)
            elif not _ADAPTER.fullmatch(entry.name):
                kept.append(entry)
        return kept

    def _added(self, base: Entry, layer: str) -> Entry:
        down, up, scale = self.halves[layer, "A"], self.halves[layer, "B"], self.alpha / self.rank

        def read() -> torch.Tensor:
            live = base.read().to(base.dtype).float()
            return torch.addmm(live, up.read().float(), down.read().float(), alpha=scale)

        return replace(base, read=read)

    def file(self) -> list[PlannedFile]:
        """Their weights alone, as PEFT names them; empty without adapters, or if PEFT could not name their base."""
        if not self.halves or self.base is None:
            return []
        renamed = tuple(
            replace(entry, name=f"base_model.model.{_in_backbone(layer)}.lora_{half}.weight")
            for (layer, half), entry in self.halves.items()
        )
        return [PlannedFile(f"{ADAPTER_FOLDER}/adapter_model.safetensors", renamed)]

    def write_config(self, folder: Path) -> None:
        """PEFT's ``adapter_config.json`` into an export that holds `file`."""
        if not self.file():
            return
        config = {
            "peft_type": "LORA", "base_model_name_or_path": self.base, "r": self.rank, "lora_alpha": self.alpha,
            "target_modules": sorted({_in_backbone(layer) for layer, _ in self.halves}), "bias": "none",
            "inference_mode": True,
        }  # fmt: skip
        (folder / ADAPTER_FOLDER).mkdir(exist_ok=True)
        (folder / ADAPTER_FOLDER / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def config_without_adapters(config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of the merged model."""
    changed = copy.deepcopy(config)
    _encoder(changed).update({"lora_rank": 0, "backbone_train": "frozen"})
    return changed


def _in_backbone(layer: str) -> str:
    """Name of a layer within the backbone: adapters are nowhere else."""
    match = _IN_BACKBONE.fullmatch(layer)
    assert match is not None, f"{layer} is not a layer of the visual backbone"
    return match["layer"]


def _encoder(config: dict[str, Any]) -> dict[str, Any]:
    """The visual encoder's part of a model's config."""
    encoder: dict[str, Any] = config.get("visual_config", config)
    return encoder
