"""The recipe's section `train.parts`: what of a model trains, how, and at which rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from pipeline.config.section import Section


class PartConfig(Section):
    """One part of the model, named by the beginning of its parameters' names: `llm`, `connector`, `visual`,
    `visual.backbone`, `visual.word`, `visual.sentence`, a contrastive head (`word_head`), or anything inside them. The
    longest path decides alone. Parts without an entry train or stay frozen as their stage plans."""

    mode: Literal["frozen", "lora", "trained"] = "trained"
    """`lora`: its weights are frozen and its linear layers get low-rank adapters (arXiv 2106.09685), which train."""
    lr: float | None = Field(default=None, gt=0)
    """Its peak learning rate; None = `train.optimizer.lr`. The schedule is the optimizer's."""
    lr_decay: float = Field(default=1.0, gt=0, le=1)
    """Its rate times this for every layer below the top one (arXiv 1801.06146); below all layers once more."""
    start_step: int = Field(default=0, ge=0)
    """Its learning rate is 0 before this step; then it has a warm-up and a schedule of its own to the end."""
    lora_rank: int = Field(default=8, gt=0)
    """Rank of the adapters with `mode: lora`."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """Their scale: outputs are multiplied by `lora_alpha / lora_rank`."""
    lora_targets: list[str] = []
    """Layers that get adapters: the last words of their names, `*` and `?` allowed (`q_proj`, `self_attn.*`); empty =
    every linear layer but the output head."""


def part_of(name: str, paths: Iterable[str]) -> str:
    """The longest path that names a parameter, or a layer; empty if none does.

    `visual.word` names `visual.word_level.merge.norm.weight` and `visual.word_norm.bias`.
    """
    named = (path for path in paths if name == path or name.startswith((f"{path}.", f"{path}_")))
    return max(named, key=len, default="")


BACKBONE = "visual.backbone"
_SHORT_FORM = {"frozen": "frozen", "lora": "lora", "trained": "full"}
_LORA = ("lora_rank", "lora_alpha", "lora_targets")


def short_form(part: PartConfig) -> dict[str, Any]:
    """What `model.visual.backbone` says of a backbone with this plan."""
    adapters = {name: getattr(part, name) for name in _LORA} if part.mode == "lora" else {}
    return {"train": _SHORT_FORM[part.mode], **adapters}


def with_short_form(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's data, not validated yet, with the settings of `model.visual.backbone` that follow from its part and
    that nobody wrote."""
    backbone, part = _at(data, "model", "visual", "backbone"), _at(data, "train", "parts", BACKBONE)
    if not isinstance(backbone, dict) or not isinstance(part, dict):
        return data
    mode = part.get("mode", "trained")
    if mode not in _SHORT_FORM:
        return data  # named when it is validated
    adapters = {name: part[name] for name in _LORA if name in part and mode == "lora"}
    visual = {**data["model"]["visual"], "backbone": {"train": _SHORT_FORM[mode], **adapters, **backbone}}
    return {**data, "model": {**data["model"], "visual": visual}}


def _at(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


__all__ = ["BACKBONE", "PartConfig", "part_of", "short_form", "with_short_form"]
