"""The weights in an export, by their names in the models of all stages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipeline.config.schema import ModelConfig
from pipeline.errors import RecipeError
from pipeline.models.pretrained import refuse_adapters
from pipeline.models.weight_files import head_files, weight_files

MODEL_PARTS = ("visual", "connector", "llm")
HEADS = "heads"
_PREFIXES = {"slt_visual": "visual.", "llava_slt": ""}
"""What an exported model's names lack, by the type in its config.json; a language model's lack ``llm.``."""


def part_of(name: str) -> str:
    """The part of `model.init_from` that a parameter of a stage's module belongs to."""
    first = name.partition(".")[0]
    return first if first in MODEL_PARTS else HEADS


def plain(name: str) -> str:
    """A parameter's name without the adapter around its layer (`pipeline.models.lora`)."""
    return name.replace(".base_layer.", ".")


class Export:
    """An exported folder, or one like it from elsewhere; no tensor is read before it is asked for.

    Args:
        folder: with config.json and safetensors files.

    Raises:
        RecipeError: it holds no such files, none that can be read, or its weights without their adapters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        refuse_adapters(str(folder), "model.init_from")
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            self._prefix = _PREFIXES.get(self.config.get("model_type", ""), "llm.")
            files = [(path, self._prefix) for path in weight_files(folder) if path.suffix == ".safetensors"]
            files += [(path, "") for path in head_files(folder)]
            self._held = {plain(f"{prefix}{name}"): (path, name) for path, prefix in files for name in _names(path)}
        except (OSError, ValueError) as error:
            text = f"model.init_from: {folder} cannot be read: {error}; give a folder of `slt export`"
            raise RecipeError(text) from error
        if not self._held:
            raise RecipeError(f"model.init_from: {folder} holds no safetensors files; give a folder of `slt export`")

    @property
    def parts(self) -> list[str]:
        """Those it holds."""
        return sorted({part_of(name) for name in self._held})

    def names(self, part: str) -> list[str]:
        """Of the tensors of a part, as a stage's module calls them before it adds adapters."""
        return [name for name in self._held if part_of(name) == part]

    def shape(self, name: str) -> tuple[int, ...]:
        path, stored = self._held[name]
        with safe_open(path, "pt") as file:
            return tuple(file.get_slice(stored).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """As stored, on the CPU; memory-mapped."""
        path, stored = self._held[name]
        with safe_open(path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored)
            return tensor


def init_folders(model: ModelConfig) -> dict[str, Path]:
    """Part -> the export that `model.init_from` gives it; of `model.init_from.model` every part that it holds."""
    named = model.init_from
    paths = {"visual": named.visual, "connector": named.connector, "llm": named.llm, HEADS: named.heads}
    given = {part: Path(path) for part, path in paths.items() if path is not None}
    return given if named.model is None else dict.fromkeys(Export(Path(named.model)).parts, Path(named.model)) | given


def _names(path: Path) -> Iterator[str]:
    with safe_open(path, "pt") as file:
        yield from file.keys()


__all__ = ["HEADS", "MODEL_PARTS", "Export", "init_folders", "part_of", "plain"]
