"""The pretrained parts that a recipe names: whether each is on this machine and is what it should be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import Recipe
from pipeline.config.stages import STAGES

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHTS = ("*.safetensors", "*.bin")
_EXPORT = "export"


@dataclass(frozen=True, slots=True)
class Part:
    """A setting that names a pretrained part."""

    name: str
    path: str
    weights: bool = True
    """Whether it is a model; otherwise a tokenizer."""
    hub: bool = True
    """Whether it may be a hub id."""


def parts_of(recipe: Recipe) -> Iterator[Part]:
    """The pretrained parts that the recipe's stage reads."""
    model, needed = recipe.model, STAGES[recipe.stage].parts
    named: list[tuple[str, str | None, bool, bool]] = []
    if model.llm is not None and "llm" in needed:
        named.append(("model.llm.path", model.llm.path, True, True))
        name = "model.llm.tokenizer" if model.llm.tokenizer else "model.llm.path"
        named.append((name, model.llm.tokenizer or model.llm.path, False, True))
    if model.visual is not None and "visual" in needed:
        named.append(("model.visual.path", model.visual.path, True, False))
        if model.visual.backbone is not None:
            named.append(("model.visual.backbone.path", model.visual.backbone.path, True, True))
    if model.text_encoder is not None and "text_encoder" in needed:
        named += [("model.text_encoder.path", model.text_encoder.path, weights, True) for weights in (True, False)]
    named += [(f"model.init_from.{part}", path, True, False) for part, path in model.init_from.model_dump().items()]
    yield from (Part(name, path, weights, hub) for name, path, weights, hub in named if path is not None)


def part_problem(part: Part) -> str:
    """What is wrong with a pretrained part; empty if nothing is, or only the hub can tell."""
    try:
        return _problem(part, Path(part.path))
    except OSError as error:  # permissions, a network disk that is gone
        return f"cannot be read: {error.filename}: {error.strerror}; correct its permissions or its mount"


def _problem(part: Part, folder: Path) -> str:
    if not folder.is_dir():
        if part.hub and _HUB_ID.fullmatch(part.path):
            return _hub_problem(part.path)
        if folder.name == _EXPORT:
            return f"does not exist; it is written by `slt export {folder.parent}` once that stage has been trained"
        return "does not exist; name an existing folder" + (" or a hub id" if part.hub else "")
    if not part.weights:
        names = " or ".join(TOKENIZER_FILES[:3])
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return f"holds no tokenizer ({names})"
        return _json_problem(folder / "tokenizer.json")
    if not (folder / "config.json").is_file():
        return "holds no config.json, so it is not a Hugging Face model"
    if text := _json_problem(folder / "config.json"):
        return text
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        return f"holds no weights ({' or '.join(_WEIGHTS)}); copy or export it again"
    return _missing_weights(folder)


def missing_part(recipe: Recipe) -> str:
    """The first pretrained part that is not on this machine, and why; empty if all are, or the hub may have them."""
    return next((f"{part.name}={part.path} {text}" for part in parts_of(recipe) if (text := part_problem(part))), "")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a pretrained part; empty if it is missing, unreadable or something else, which `part_problem`
    or the model's loader says."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _json_problem(file: Path) -> str:
    if not file.is_file() or read_json(file):
        return ""
    return f"holds a {file.name} that cannot be read; copy or export it again"


def _missing_weights(folder: Path) -> str:
    """Files that an index of split weights names and the folder lacks."""
    for index in folder.glob("*.index.json"):
        files = set(map(str, (read_json(index).get("weight_map") or {}).values()))
        if absent := sorted(name for name in files if not (folder / name).is_file()):
            return f"lacks {len(absent)} of its {len(files)} weight files, first {absent[0]}; copy or export it again"
    return ""


def _hub_problem(path: str) -> str:
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE) / f"models--{path.replace('/', '--')}" / "snapshots"
    if not constants.HF_HUB_OFFLINE or cached.is_dir():
        return ""
    return "is not a folder here, and the hub cannot be reached (HF_HUB_OFFLINE); download it, or correct the path"


__all__ = ["TOKENIZER_FILES", "Part", "missing_part", "part_problem", "parts_of", "read_json"]
