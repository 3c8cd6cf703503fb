"""Names of the files that hold a model's weights."""

from __future__ import annotations

import json
from pathlib import Path

_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers loads from a folder, sorted; empty if there are none."""
    found = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    if found is None:
        return []
    if found.suffix != ".json":
        return [found]
    names = set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / name for name in sorted(names)]


def head_files(folder: Path) -> list[Path]:
    """Of the weights in an export that belong to the stage and not to the exported model."""
    return sorted(folder.glob("heads*.safetensors"))


def files_of(part: str, folder: Path) -> list[Path]:
    """The files that hold a part."""
    return head_files(folder) if part == "heads" else weight_files(folder)
