"""Starts a new run with the weights of earlier exports (`model.init_from`).

Nothing is taken over silently: every tensor of a part must be in the export and fit, the settings that give the
weights their meaning must be equal, and the log names what was loaded and what begins new.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from pipeline.config.schema import LlmConfig, ModelConfig
from pipeline.errors import RecipeError
from pipeline.models.exported import HEADS, Export, init_folders, part_of, plain
from pipeline.models.fingerprint import export_fingerprint
from pipeline.models.language import load_tokenizer
from shards.text import tokenizer_fingerprint

log = logging.getLogger(__name__)

_SHOWN = 50
_MEANING = {
    "visual": (
        "pool", "stride", "window_frames", "word_heads", "sentence_heads", "centre_clips", "image_mean", "image_std",
        "pose_layout", "pose_groups", "pose_fingerprint", "features_width", "clip_stride",
    ),
    "llm": ("model_type", "num_attention_heads", "num_key_value_heads", "hidden_act", "rope_parameters"),
    "connector": ("connector_tokens",),
}  # fmt: skip
"""Settings without which the same weights would compute something else, by part."""


def warm_start(module: nn.Module, model: ModelConfig, only: Collection[str] | None = None) -> dict[str, Path]:
    """Copy the weights of `model.init_from` into a stage's module. All ranks must call.

    Args:
        module: complete, its parameters whole or partitioned by ZeRO-3; adapters are best added later.
        model: the recipe's section.
        only: load no other parts; None = all that are given.

    Returns:
        Part -> folder, of the parts that were loaded.

    Raises:
        RecipeError: an export lacks a part, tensors are missing, left over or of another shape, or the part was trained
            with other settings or another tokenizer; names all of it. The module is unchanged then.
    """
    own = _tensors(module)
    held = {part_of(name) for name in own}
    chosen: dict[str, Export] = {}
    problems: list[str] = []
    for part, folder in init_folders(model).items():
        if part not in held or (only is not None and part not in only):
            continue
        export = chosen[part] = Export(folder)
        problems += [f"{part} of {folder}: {text}" for text in _problems(part, export, own, module, model.llm)]
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise RecipeError(
            "model.init_from does not fit this recipe's model:\n  " + "\n  ".join(problems[:_SHOWN]) + more
            + "\n  fix: build the model as the export's recipe.resolved.yaml says, or take fewer parts from it"
        )  # fmt: skip
    for part, export in chosen.items():
        _load(part, export, own)
        if part == "visual":
            _take_over_identity(getattr(module, "visual").config, export)  # noqa: B009  (a Module's attribute)
    return {part: export.folder for part, export in chosen.items()}


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, tied ones once, and saved buffers."""
    found: dict[str, torch.Tensor] = {plain(name): tensor for name, tensor in module.named_parameters()}
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                found[f"{prefix}.{name}".lstrip(".")] = buffer
    return found


def _wanted(part: str, export: Export, own: Collection[str]) -> tuple[list[str], list[str]]:
    """Names of the part in the module and in the export; of heads only those modules that both have.

    Adapters that only the module has change nothing while they are new.
    """
    mine, theirs = [name for name in own if part_of(name) == part], export.names(part)
    if part == HEADS:
        shared = {name.partition(".")[0] for name in mine} & {name.partition(".")[0] for name in theirs}
        mine, theirs = ([n for n in names if n.partition(".")[0] in shared] for names in (mine, theirs))
    if not any(".lora_" in name for name in theirs):
        mine = [name for name in mine if ".lora_" not in name]
    return mine, theirs


def _problems(
    part: str, export: Export, own: dict[str, torch.Tensor], module: nn.Module, llm: LlmConfig | None
) -> Iterator[str]:
    mine, theirs = _wanted(part, export, own)
    if not theirs:
        yield f"the export holds no {part}; it has {', '.join(export.parts)}"
        return
    yield from (f"{name} is not in the export" for name in mine if name not in theirs)
    yield from (f"{name} is not in the model" for name in theirs if name not in mine)
    for name in theirs:
        if name in mine and (stored := export.shape(name)) != (here := _shape(own[name])):
            yield f"{name} is {stored} in the export, {here} in the model"
    before, now = _settings(_exported_config(export, part)), _settings(_config(module, part))
    scales = ("lora_alpha", "adapters") if any(".lora_" in name for name in theirs) else ()
    for name in (*_MEANING.get(part, ()), *scales):
        if before.get(name) != now.get(name):
            yield f"{name} is {before.get(name)!r} in the export, {now.get(name)!r} in the model"
    if part == "visual" and now.get("features_width") and before["backbone_fingerprint"] != now["backbone_fingerprint"]:
        yield "the stored features it was trained on are others than those of model.visual.features"
    if part == "llm" and llm is not None:
        yield from _tokenizer_problems(llm, export.folder)


def _tokenizer_problems(llm: LlmConfig, folder: Path) -> Iterator[str]:
    if not (folder / "tokenizer.json").is_file():
        yield "the export holds no tokenizer.json"
        return
    before, now = (tokenizer_fingerprint(load_tokenizer(config)) for config in (LlmConfig(path=str(folder)), llm))
    if before != now:
        yield f"its tokenizer makes other ids than {llm.tokenizer or llm.path}; set model.llm.tokenizer to {folder}"


def _exported_config(export: Export, part: str) -> Any:
    config = AutoConfig.from_pretrained(export.folder)
    return getattr(config, {"visual": "visual_config", "llm": "text_config"}.get(part, ""), config)


def _config(module: nn.Module, part: str) -> Any:
    return getattr(module if part == "connector" else getattr(module, part, None), "config", None)


def _settings(config: Any) -> dict[str, Any]:
    """With plain values, as a file holds them."""
    content: dict[str, Any] = {} if config is None else json.loads(config.to_json_string(use_diff=False))
    return content


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _load(part: str, export: Export, own: dict[str, torch.Tensor]) -> None:
    mine, _ = _wanted(part, export, own)
    for name in mine:
        _copy(own[name], export.tensor(name))
    new = sorted({name.partition(".")[0] for name in own if part_of(name) == part and name not in mine})
    log.info("model.init_from: %s: %d tensors of %s", part, len(mine), export.folder)
    if new:
        log.warning("model.init_from: %s of %s holds no %s: new weights", part, export.folder, ", ".join(new))


def _copy(target: Any, value: torch.Tensor) -> None:
    """Into a tensor that ZeRO-3 may have spread over the ranks; all ranks must call."""
    spread = hasattr(target, "ds_id")
    if spread:
        target.all_gather()
    with torch.no_grad():
        target.data.copy_(value)
    if spread:
        target.partition(has_been_updated=True)


def _take_over_identity(config: Any, export: Export) -> None:
    """Stored features must belong to the backbone that was loaded, not to the one that was built."""
    before = _exported_config(export, "visual")
    if before.backbone_config is None:
        return
    config.backbone_fingerprint = before.backbone_fingerprint
    if not before.backbone_fingerprint and export.config["model_type"] == "slt_visual":
        config.backbone_fingerprint = export_fingerprint(export.folder, before)


__all__ = ["warm_start"]
