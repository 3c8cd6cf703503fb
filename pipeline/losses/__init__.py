"""Training objectives: token cross-entropy, sentence-level and token-level contrastive losses.

All of them return *sums or local means* that become exact global values after the caller's normalisation.
"""

from __future__ import annotations

from pipeline.losses.contrastive import clamped_scale, sentence_contrastive, token_contrastive
from pipeline.losses.similarity import Tokens, normalised, one_way_similarity, padded
from pipeline.losses.tiles import Tile
from pipeline.losses.token import (
    IGNORE_LABEL,
    Backend,
    Criterion,
    ScaledHead,
    TokenLoss,
    token_criterion,
    token_cross_entropy,
)

__all__ = [
    "IGNORE_LABEL",
    "Backend",
    "Criterion",
    "ScaledHead",
    "Tile",
    "TokenLoss",
    "Tokens",
    "clamped_scale",
    "normalised",
    "one_way_similarity",
    "padded",
    "sentence_contrastive",
    "token_contrastive",
    "token_criterion",
    "token_cross_entropy",
]
