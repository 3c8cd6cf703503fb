"""Training objectives: token cross-entropy, sentence-level and token-level contrastive losses.

All of them return *sums or local means* that become exact global values after the caller's normalisation.
"""

from __future__ import annotations

from pipeline.losses.contrastive import (
    Gather,
    Tokens,
    clamped_scale,
    normalised_tokens,
    sentence_contrastive,
    token_contrastive,
    token_similarity,
)
from pipeline.losses.token import IGNORE_LABEL, Backend, ScaledHead, TokenLoss, token_cross_entropy

__all__ = [
    "IGNORE_LABEL",
    "Backend",
    "Gather",
    "ScaledHead",
    "TokenLoss",
    "Tokens",
    "clamped_scale",
    "normalised_tokens",
    "sentence_contrastive",
    "token_contrastive",
    "token_cross_entropy",
    "token_similarity",
]
