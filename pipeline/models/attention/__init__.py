"""Attention of every stage over packed rows: one kernel, chosen once, never across the borders of a run.

`choosing` says which kernel runs here, `ragged` calls it, `runs` holds borders, `packed` brings it into Hugging Face
language models.
"""

from __future__ import annotations

from pipeline.models.attention.choosing import BACKENDS, choose
from pipeline.models.attention.packed import (
    KEY_PREFIX,
    Packed,
    check_model,
    implementation,
    packed_kwargs,
    register,
)
from pipeline.models.attention.ragged import Reach, ragged_attention
from pipeline.models.attention.runs import Runs

__all__ = [
    "BACKENDS",
    "KEY_PREFIX",
    "Packed",
    "Reach",
    "Runs",
    "check_model",
    "choose",
    "implementation",
    "packed_kwargs",
    "ragged_attention",
    "register",
]
