"""Hidden sizes of a recipe's models, from their config files alone: no weights, no torch, no network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.schema import Recipe
from pipeline.config.stages import STAGES

_NESTED = ("text_config", "vision_config", "backbone_config", "visual_config")


def widest(recipe: Recipe) -> int | None:
    """The largest hidden size of the parts that the recipe's stage builds; None when no config can be read here."""
    return max(_widths(recipe), default=None)


def _widths(recipe: Recipe) -> Iterator[int]:
    model, needed = recipe.model, STAGES[recipe.stage].parts
    if model.llm is not None and "llm" in needed:
        yield from [model.llm.tiny.width] if model.llm.tiny is not None else _of_config(model.llm.path)
    if model.visual is not None and "visual" in needed:
        backbone = model.visual.backbone
        if model.visual.path is not None:
            yield from _of_config(model.visual.path)
        else:
            yield model.visual.width
        if backbone is not None:
            yield from [backbone.tiny.width] if backbone.tiny is not None else _of_config(backbone.path)


def _of_config(path: str | None) -> Iterator[int]:
    file = None if path is None else _config_file(path)
    if file is None:
        return
    try:
        yield from _sizes(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # `check_inputs` and the model's loader say what is wrong with it
        return


def _sizes(config: dict[str, Any]) -> Iterator[int]:
    for name in ("hidden_size", "hidden_dim", "width"):
        if isinstance(value := config.get(name), int):
            yield value
    yield from (value for value in config.get("hidden_sizes") or [] if isinstance(value, int))
    for name in _NESTED:
        if isinstance(nested := config.get(name), dict):
            yield from _sizes(nested)


def feature_width(config: dict[str, Any]) -> int | None:
    """Channels of a vision model's last hidden state, from its config; None if it does not say."""
    half = config.get("vision_config")
    config = half if isinstance(half, dict) else config
    for name in ("hidden_size", "hidden_dim"):
        if isinstance(value := config.get(name), int):
            return value
    sizes = config.get("hidden_sizes")
    return int(sizes[-1]) if isinstance(sizes, list) and sizes else None


def _config_file(path: str) -> Path | None:
    """config.json of a folder, or of a hub id that was downloaded before."""
    if (folder := Path(path)).is_dir():
        return folder / "config.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


__all__ = ["feature_width", "widest"]
