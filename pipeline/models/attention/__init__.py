"""Attention of every stage over packed rows: one kernel, chosen once, never across the borders of a span.

`choosing` says which kernel runs here, `ragged` calls it, `spans` holds borders, `packed` brings it into Hugging Face
language models, `sequence_parallel` brings slices of sequences together for it.
"""

from __future__ import annotations

from pipeline.models.attention.choosing import BACKENDS, choose
from pipeline.models.attention.packed import (
    KEY_PREFIX,
    Packed,
    check_model,
    choose_for,
    head_dim,
    implementation,
    packed_kwargs,
    refuse_masks,
    register,
)
from pipeline.models.attention.ragged import Reach, ragged_attention
from pipeline.models.attention.sequence_parallel import check_heads
from pipeline.models.attention.spans import Spans

__all__ = [
    "BACKENDS",
    "KEY_PREFIX",
    "Packed",
    "Reach",
    "Spans",
    "check_heads",
    "check_model",
    "choose",
    "choose_for",
    "head_dim",
    "implementation",
    "packed_kwargs",
    "ragged_attention",
    "refuse_masks",
    "register",
]
