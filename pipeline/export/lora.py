"""Adapters (LoRA, arXiv 2106.09685) of an export: added to the weights they adapt, or kept as the run trained them.

Kept, they stay in the model's own files where its config can say so; a plain language model gets its weights without
them. Those of a backbone or a language model are also written alone, as a folder that PEFT reads.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.config.schema import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.export.entry import Entry
from pipeline.export.safetensors_file import PlannedFile
from pipeline.models.pretrained import ADAPTER_FOLDER

_ADAPTER = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])\.default\.weight")


@dataclass(frozen=True, slots=True)
class Base:
    """A model that adapters belong to, as others can load it."""

    folder: str
    """Of its adapters, in the export."""
    prefix: str
    """Of its layers' names in the export."""
    path: str | None
    """Folder or hub id; None if no folder holds it alone."""


def bases_of(model: ModelConfig, plan: Mapping[str, Any]) -> list[Base]:
    """The models that the adapters of a recipe's export may belong to."""
    backbone = None if model.visual is None or model.visual.backbone is None else model.visual.backbone.path
    llm, started = None if model.llm is None else model.llm.path, model.init_from
    if started.visual or started.model:  # an encoder's export holds the backbone, but is no model of its own
        backbone = None
    if started.llm or started.model:
        llm = started.llm or (started.model if plan["prefix"] == "llm." else None)
    found = (
        Base("backbone_adapter", "visual.backbone.model.".removeprefix(plan["prefix"]), backbone),
        Base(ADAPTER_FOLDER, "llm.".removeprefix(plan["prefix"]), llm),
    )
    inside = ("visual.", "llm.") if not plan["prefix"] else (plan["prefix"],)
    return [base for base, of in zip(found, ("visual.", "llm."), strict=True) if of in inside]


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters among the tensors of an export."""

    halves: dict[tuple[str, str], Entry]
    """Layer, and A (down) or B (up) -> its weight."""
    alphas: dict[str, float]
    """Layer -> scale, times the rank."""
    bases: list[Base]

    @classmethod
    def of(
        cls, entries: Iterable[Entry], config: dict[str, Any], plan: Mapping[str, Any], bases: list[Base]
    ) -> Adapters:
        """Those of a model with this ``config.json`` and export plan; it may have none."""
        halves = {}
        for entry in entries:
            if match := _ADAPTER.fullmatch(entry.name):
                halves[match["layer"], match["half"]] = entry
        # checkpoints of earlier releases say it in the config alone, once for the backbone
        alphas = {layer: float(_encoder(config).get("lora_alpha", 0.0)) for layer, _ in halves}
        for group in plan.get("adapters", ()):
            layers = (name.removeprefix(plan["prefix"]) for name in group["layers"])
            alphas |= {layer: float(group["alpha"]) for layer in layers if (layer, "A") in halves}
        return cls(halves, alphas, bases)

    def merge(self, entries: Iterable[Entry]) -> list[Entry]:
        """The same model without adapters: each is added to its layer when that is written.

        Sums are computed in float32 from the layer's weight as the live model holds it.
        """
        return [self._added(entry) for entry in self.without(entries)]

    def without(self, entries: Iterable[Entry]) -> list[Entry]:
        """The layers as they are without adapters, under the names they have then."""
        return [
            replace(entry, name=entry.name.replace(".base_layer.", "."))
            for entry in entries
            if not _ADAPTER.fullmatch(entry.name)
        ]

    def _added(self, base: Entry) -> Entry:
        layer = base.name.removesuffix(".weight")
        if (layer, "A") not in self.halves:
            return base
        down, up = self.halves[layer, "A"], self.halves[layer, "B"]
        scale = self.alphas[layer] / down.shape[0]

        def read() -> torch.Tensor:
            live = base.read().to(base.dtype).float()
            return torch.addmm(live, up.read().float(), down.read().float(), alpha=scale)

        return replace(base, read=read)

    def files(self) -> list[PlannedFile]:
        """Their weights alone, as PEFT names them, for every base that a folder or the hub holds."""
        return [
            PlannedFile(f"{base.folder}/adapter_model.safetensors", tuple(self._renamed(base)))
            for base in self.bases
            if base.path is not None and self._layers(base)
        ]

    def _renamed(self, base: Base) -> Iterable[Entry]:
        for (layer, half), entry in self.halves.items():
            if layer.startswith(base.prefix):
                inside = layer.removeprefix(base.prefix)
                yield replace(entry, name=f"base_model.model.{inside}.lora_{half}.weight")

    def _layers(self, base: Base) -> dict[str, tuple[int, float]]:
        """Layer of a base -> rank and alpha."""
        return {
            layer.removeprefix(base.prefix): (entry.shape[0], self.alphas[layer])
            for (layer, half), entry in self.halves.items()
            if half == "A" and layer.startswith(base.prefix)
        }

    def write_configs(self, folder: Path) -> None:
        """PEFT's ``adapter_config.json`` beside each of `files`."""
        for base in self.bases:
            layers = self._layers(base)
            if base.path is None or not layers:
                continue
            rank, alpha = next(iter(layers.values()))
            config: dict[str, Any] = {
                "peft_type": "LORA", "base_model_name_or_path": base.path, "r": rank, "lora_alpha": alpha,
                "target_modules": sorted(layers), "bias": "none", "inference_mode": True,
            }  # fmt: skip
            other = {layer: pair for layer, pair in layers.items() if pair != (rank, alpha)}
            if other:
                exact = {f"^{re.escape(layer)}$": pair for layer, pair in other.items()}
                config["rank_pattern"] = {name: pair[0] for name, pair in exact.items()}
                config["alpha_pattern"] = {name: pair[1] for name, pair in exact.items()}
            (folder / base.folder).mkdir(exist_ok=True)
            (folder / base.folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def config_without_adapters(config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of the merged model."""
    changed = copy.deepcopy(config)
    for holder in (changed, _encoder(changed)):
        holder.pop("adapters", None)
    encoder = _encoder(changed)
    if encoder.get("lora_rank", 0):
        encoder.update({"lora_rank": 0, "backbone_train": "frozen"})
        encoder.pop("lora_targets", None)
    return changed


def check_kept(adapters: Adapters) -> None:
    """Raises CheckpointError: there is nothing to keep."""
    if not adapters.halves:
        raise CheckpointError("the model has no LoRA adapters to keep; leave out --lora keep")


def _encoder(config: dict[str, Any]) -> dict[str, Any]:
    """The visual encoder's part of a model's config."""
    encoder: dict[str, Any] = config.get("visual_config", config)
    return encoder
