"""Settings of a recipe that change nothing, because the stage or another setting leaves them unread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.prompt_schema import cues_of
from pipeline.config.schema import Recipe
from pipeline.config.stages import STAGES

_NEW_ENCODER = ("width", "dropout", "max_frames", "centre_clips", "word", "sentence")
_REMOTE = ("access", "cache_gib", "storage_options")
_HELD_OUT = (
    "train.eval_batches", "connector.eval_samples", "connector.num_beams", "connector.max_new_tokens",
    "connector.score_protocol", "data.references.scored",
)  # fmt: skip
_OF_SAMPLES = ("connector.max_new_tokens", "connector.score_protocol")
"""Those of held-out texts that hold for the texts a stage samples in training, too."""
_OF_OBJECTIVE = {"minimum_risk": ("sharpness", "include_reference"), "grpo": ("clip", "kl_weight")}


def unread(recipe: Recipe, origins: Mapping[str, str]) -> Iterator[str]:
    """One sentence per setting that was written with another value than its default and that nothing reads.

    Args:
        recipe: a sound recipe.
        origins: where each setting was written.
    """
    for name in STAGES[recipe.stage].unread:
        if origin := _where_changed(recipe, origins, name):
            yield f"{name} ({origin}) is not read by the {recipe.stage} stage"
    for name, reason in _left_out(recipe):
        covered = any(f"{name}.".startswith(f"{known}.") for known in STAGES[recipe.stage].unread)
        if not covered and (origin := _where_changed(recipe, origins, name)):
            yield f"{name} ({origin}) is not read: {reason}"


def _left_out(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(setting, why another setting leaves it out)."""
    model, data, optimizer = recipe.model, recipe.data, recipe.train.optimizer
    visual, objective = model.visual, recipe.contrastive.objective
    if visual is not None and visual.path is not None:
        for name in _NEW_ENCODER:
            yield f"model.visual.{name}", "it comes from the exported encoder in model.visual.path"
    elif visual is not None and visual.backbone is None:
        yield "data.image_pixels", "model.visual has no backbone that reads images"
    elif visual is not None and visual.backbone is not None and visual.backbone.train != "lora":
        for name in ("lora_rank", "lora_alpha", "lora_targets"):
            yield f"model.visual.backbone.{name}", f"model.visual.backbone.train is {visual.backbone.train}, not lora"
    if not data.jitter.most_seconds:
        for name in ("probability", "corpora"):
            yield f"data.jitter.{name}", "data.jitter moves no cut: before_seconds and after_seconds are 0"
    if not data.augment.erase:
        yield "data.augment.erase_area", "data.augment.erase is 0"
    if visual is not None and visual.path is None and visual.pose is None:
        for name in ("pose_scale", "pose_turn", "pose_shift", "pose_drop"):
            yield f"data.augment.{name}", "model.visual reads no keypoints"
    if objective != "both":
        yield "contrastive.token_weight", f"contrastive.objective is {objective}, not both"
    ctc, alignment = recipe.contrastive.ctc, recipe.contrastive.alignment
    if objective == "sentence" and not alignment.used:
        yield "model.text_encoder.token_features", "contrastive.objective is sentence"
    if not ctc.used:
        yield "contrastive.ctc.unusable", "contrastive.ctc.weight and set_weight are 0"
    if not ctc.weight:
        for name in ("order", "start_step"):
            yield f"contrastive.ctc.{name}", "contrastive.ctc.weight is 0"
    if not ctc.used and not alignment.used:
        yield "contrastive.glosses", "the weights of contrastive.ctc and contrastive.alignment are 0"
    if objective == "token":
        for name in ("model.text_encoder.pooling", "contrastive.sentence_loss"):
            yield name, "contrastive.objective is token"
    for name in ("previous", "gloss", "example"):
        if name not in cues_of(recipe.connector.prompt):
            yield f"connector.prompts.{name}", f"connector.prompt does not contain {{{name}}}"
    for name in ("language", "sign_language"):
        if name not in cues_of(recipe.connector.prompt):
            yield f"connector.prompts.{name}s", f"connector.prompt does not contain {{{name}}}"
    if optimizer.schedule != "wsd":
        yield "train.optimizer.decay_fraction", f"train.optimizer.schedule is {optimizer.schedule}, not wsd"
    if optimizer.schedule == "constant":
        yield "train.optimizer.final_lr_fraction", "train.optimizer.schedule is constant"
    if not any("://" in source.shards for source in (*data.train, *data.eval)):
        for name in _REMOTE:
            yield f"data.{name}", "no source is in an object store"
    if recipe.train.averaging.kind == "none":
        for name in ("decay", "start"):
            yield f"train.averaging.{name}", "train.averaging.kind is none"
    if not data.eval:
        for name in _HELD_OUT:
            if recipe.stage != "sequence_tuning" or name not in _OF_SAMPLES:
                yield name, "data.eval is empty"
    tuning = recipe.sequence_tuning.objective
    for other, names in _OF_OBJECTIVE.items():
        for name in names if other != tuning else ():
            yield f"sequence_tuning.{name}", f"sequence_tuning.objective is {tuning}"


def _where_changed(recipe: Recipe, origins: Mapping[str, str], name: str) -> str:
    """Where the setting, or one inside it, was set to another value than its default; empty if nowhere."""
    for path, origin in origins.items():
        if f"{path}.".startswith(f"{name}.") and _differs(recipe, path):
            return origins.get(name, origin)
    return ""


def _differs(recipe: Recipe, path: str) -> bool:
    """Whether a setting, not a section, differs from its default; list items count as the list's."""
    holder: Any = recipe
    keys = path.split(".")
    for part in keys[:-1]:
        holder = getattr(holder, part, None)
    field = type(holder).model_fields.get(keys[-1]) if hasattr(type(holder), "model_fields") else None
    if field is None:
        return False
    value = getattr(holder, keys[-1])
    return not hasattr(value, "model_fields") and (field.is_required() or value != field.get_default())
