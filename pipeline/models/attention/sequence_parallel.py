"""Attention when several ranks hold slices of one sequence (Ulysses, arXiv 2309.14509).

Everything but attention works on single positions, so it works on slices. Around attention, an all-to-all turns
slices with all heads into whole sequences with a part of the heads, and another one turns them back.

Shape suffixes: B rows, L positions, H heads, C channels per head, R ranks of the group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline import dist
from pipeline.config.checks import heads_problem
from pipeline.dist import SequenceGroup
from pipeline.errors import RecipeError


def check_heads(llm: PreTrainedModel, size: int) -> None:
    """Refuses a model whose heads ``size`` ranks cannot share. Raises RecipeError."""
    config = llm.config.get_text_config()
    heads = int(config.num_attention_heads)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    if problem := heads_problem(heads, key_heads, size):
        raise RecipeError(f"model.llm: {problem}")


def to_whole_sequences(
    query: Tensor, key: Tensor, value: Tensor, group: SequenceGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, L / R, C] each -> [B, H / R, L, C]: this rank's heads over the whole sequence.

    Keys and values may have heads of their own number; fewer than R are repeated, as DeepSpeed's UlyssesSPAttentionHF
    does.
    """
    parts = [_heads_of_ranks(states, group.size) for states in (query, key, value)]
    received = dist.exchange_parts(torch.cat(parts, dim=2), group)
    q, k, v = (
        states.permute(1, 2, 0, 3, 4).flatten(2, 3) for states in received.split([part.shape[2] for part in parts], 2)
    )
    return q, k, v


def _heads_of_ranks(states: Tensor, size: int) -> Tensor:
    """[B, H, L, C] -> [R, B, H / R, L, C]."""
    if states.shape[1] < size:
        states = states.repeat_interleave(size // states.shape[1], dim=1)
    return states.unflatten(1, (size, -1)).movedim(1, 0)


def to_slices(mixed: Tensor, group: SequenceGroup) -> Tensor:
    """[B, L, H / R, C], some heads over the whole sequence -> [B, L / R, H, C], this rank's slice."""
    parts = mixed.unflatten(1, (group.size, -1)).movedim(1, 0)
    return dist.exchange_parts(parts, group).permute(1, 2, 0, 3, 4).flatten(2, 3)
