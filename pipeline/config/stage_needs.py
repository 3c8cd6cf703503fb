"""What a recipe must hold for each stage, and what of it the stage leaves aside; known without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageNeeds:
    """The settings of one stage."""

    parts: tuple[str, ...]
    """Sections of `model` that must be there."""
    shards: tuple[str, ...]
    """Kinds of shard sets it reads."""
    unread: tuple[str, ...]
    """What it never reads, sections or single settings."""


STAGE_NEEDS = {
    "continued_pretraining": StageNeeds(
        parts=("llm",),
        shards=("text",),
        unread=(
            "contrastive", "connector", "model.visual", "model.text_encoder", "model.connector",
            "data.max_frames", "data.frame_stride", "data.image_pixels", "data.frame_budget", "data.length_window",
            "data.unique_texts",
        ),
    ),
    "contrastive": StageNeeds(
        parts=("visual", "text_encoder"),
        shards=("video", "features"),
        unread=(
            "continued_pretraining", "connector", "model.llm", "model.connector", "model.attention",
            "data.block_tokens", "data.frame_budget", "train.peak_tflops",
        ),
    ),
    "connector": StageNeeds(
        parts=("llm", "visual"),
        shards=("video", "features"),
        unread=(
            "continued_pretraining", "contrastive", "model.text_encoder", "model.attention", "data.block_tokens",
            "data.unique_texts", "train.peak_tflops",
        ),
    ),
}  # fmt: skip
