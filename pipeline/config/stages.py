"""The stages: where each is, what its recipe must hold, and which settings it ignores.

Imports no stage, because recipes are checked on machines without torch. Adding a stage = a file in
``pipeline/stages`` and an entry here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StageEntry:
    """One stage."""

    implementation: str
    """``module:class``."""
    parts: tuple[str, ...]
    """Sections of `model` that must be there."""
    shards: tuple[str, ...]
    """Kinds of shard sets it reads."""
    unread: tuple[str, ...]
    """Sections or settings that it never reads."""
    contrasts: bool = False
    """Its loss compares the items of a batch: their number is fixed, at least two, best without equal texts."""
    translates: bool = False
    """Its module is the whole translation model, of which it trains the connector; so is its export."""


STAGES = {
    "continued_pretraining": StageEntry(
        "pipeline.stages.continued_pretraining:ContinuedPretraining",
        parts=("llm",),
        shards=("text",),
        unread=(
            "contrastive", "connector", "sequence_tuning", "model.visual", "model.text_encoder", "model.connector",
            "data.train.pose", "data.eval.pose",
            "data.max_frames", "data.frame_stride", "data.image_pixels", "data.frame_budget", "data.pack_tokens",
            "data.length_window", "data.unique_texts", "data.augment", "data.references",
            "data.jitter",
        ),
    ),
    "contrastive": StageEntry(
        "pipeline.stages.contrastive:Contrastive",
        parts=("visual", "text_encoder"),
        shards=("video", "features"),
        unread=(
            "continued_pretraining", "connector", "sequence_tuning", "model.llm", "model.connector", "model.kernels",
            "data.block_tokens", "data.frame_budget", "data.pack_tokens", "train.peak_tflops",
            "data.references.scored",
        ),
        contrasts=True,
    ),
    "connector": StageEntry(
        "pipeline.stages.connector:ConnectorStage",
        parts=("llm", "visual"),
        shards=("video", "features"),
        unread=(
            "continued_pretraining", "contrastive", "sequence_tuning", "model.text_encoder", "data.block_tokens",
            "data.unique_texts", "train.peak_tflops",
        ),
        translates=True,
    ),
    "sequence_tuning": StageEntry(
        "pipeline.stages.sequence_tuning:SequenceTuning",
        parts=("llm", "visual"),
        shards=("video", "features"),
        unread=(
            "continued_pretraining", "contrastive", "model.text_encoder", "data.block_tokens",
            "data.unique_texts", "train.peak_tflops",
        ),
        translates=True,
    ),
}  # fmt: skip
