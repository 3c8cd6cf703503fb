"""Samples of video and text as the documents of one packed row, made on the CPU in loader workers.

Legend: L positions of the row, M visual tokens, N answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from pipeline.models.attention import Packed, packed_kwargs

SAFE_ID = 0
"""Where visual tokens go the row holds an id that every embedding table has."""


class PackedAnswers(TypedDict):
    """Where things are in a packed row: per sample one document of prompt, visual tokens and answer."""

    packed: Packed
    """Document borders and positions."""
    visual_positions_M: Tensor
    """int64, where in the row the packed visual tokens go, in sample order."""
    label_positions_N: Tensor
    """int64, the places in front of the answer tokens: their hidden states predict the answers."""
    targets_N: Tensor
    """int64, the tokens of all answers, each with its eos."""
    visual_tokens_M: NotRequired[Tensor]
    """int64, which visual token each place takes, where documents share clips; without it they follow each other."""


class PackedRow(TypedDict):
    """Samples as the documents of one row."""

    input_ids: Tensor
    """int64 [1, L], `SAFE_ID` where visual tokens go."""
    answers: PackedAnswers


def pack_candidates(
    prompts: Sequence[list[int]], answers: Sequence[Sequence[list[int]]], video_token_id: int
) -> PackedRow:
    """As `pack_row`, with several answers to each prompt: each is a document of its own, behind the same clip.

    Args:
        answers: per prompt those that follow it, at least one.
    """
    copies_B = np.array([len(group) for group in answers])
    row = pack_row(
        [prompt for prompt, group in zip(prompts, answers, strict=True) for _ in group],
        [answer for group in answers for answer in group],
        video_token_id,
    )
    counts_B = np.array([prompt.count(video_token_id) for prompt in prompts])
    firsts_B = np.cumsum(counts_B) - counts_B
    clips_C = np.repeat(np.arange(len(prompts)), copies_B)
    tokens_M = np.concatenate([np.arange(firsts_B[clip], firsts_B[clip] + counts_B[clip]) for clip in clips_C])
    return {**row, "answers": {**row["answers"], "visual_tokens_M": torch.from_numpy(tokens_M)}}


def pack_row(prompts: Sequence[list[int]], answers: Sequence[list[int]], video_token_id: int) -> PackedRow:
    """A row of documents ``prompt + answer``: no padding, and only the answers are learned.

    Args:
        prompts: per sample its ids, ``video_token_id`` for every visual token; none is empty.
        answers: per sample the ids that follow.
    """
    lengths_B2 = np.array([(len(prompt), len(answer)) for prompt, answer in zip(prompts, answers, strict=True)])
    ids_L = np.fromiter(chain.from_iterable(chain(*pair) for pair in zip(prompts, answers, strict=True)), np.int64)
    is_video_L = ids_L == video_token_id
    is_answer_L = np.repeat(np.tile([False, True], len(lengths_B2)), lengths_B2.ravel())
    documents_L = np.repeat(np.arange(len(lengths_B2)), lengths_B2.sum(1))
    return {
        "input_ids": torch.from_numpy(np.where(is_video_L, SAFE_ID, ids_L))[None],
        "answers": {
            "packed": packed_kwargs(torch.from_numpy(documents_L)[None]),
            "visual_positions_M": torch.from_numpy(np.flatnonzero(is_video_L)),
            "label_positions_N": torch.from_numpy(np.flatnonzero(is_answer_L) - 1),
            "targets_N": torch.from_numpy(ids_L[is_answer_L]),
        },
    }
