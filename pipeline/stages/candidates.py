"""Sampled translations of a micro-batch as one packed row and a table of what is known of them. On the host.

Legend: B clips, K candidates of a clip at most, L tokens of a candidate at most, N tokens of all candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.inference.sample import Candidate
from pipeline.losses.sequence import Candidates
from pipeline.models.packed_row import PackedRow, pack_candidates

Ids = tuple[int, ...]


@dataclass(slots=True)
class Group:
    """The distinct candidates of a clip."""

    counts: dict[Ids, int] = field(default_factory=dict)
    """How often each was sampled, in the order of the first time; 0 for a reference that was not."""
    log_probs: dict[Ids, Sequence[float]] = field(default_factory=dict)
    """Of their tokens under the policy that sampled them."""
    reference: Ids | None = None
    """If it is one of them."""

    @classmethod
    def of(cls, samples: Sequence[Candidate], reference: Ids | None) -> Group:
        """Equal samples are one candidate, which is computed once."""
        group = cls(reference=reference)
        for sample in samples:
            group.counts[sample.ids] = group.counts.get(sample.ids, 0) + 1
            group.log_probs.setdefault(sample.ids, sample.log_probs)
        if reference is not None:
            group.counts.setdefault(reference, 0)
            group.log_probs.setdefault(reference, [0.0] * len(reference))
        return group


def row_of(groups: Sequence[Group], prompts: Sequence[list[int]], video_token_id: int) -> PackedRow:
    """Every candidate behind its clip's prompt, as the documents of one row."""
    return pack_candidates(prompts, [[list(ids) for ids in group.counts] for group in groups], video_token_id)


def table_of(groups: Sequence[Group], rewards: Sequence[Mapping[Ids, float]]) -> Candidates:
    """What the losses need to know of the tokens of `row_of`, in their order; ``rewards``: per clip."""
    shape = (
        len(groups), max(len(group.counts) for group in groups),
        max(len(ids) for group in groups for ids in group.counts),
    )  # fmt: skip
    mask_BKL = np.zeros(shape, dtype=np.float32)
    counts_BK, rewards_BK, is_reference_BK = np.zeros((3, *shape[:2]), dtype=np.float32)
    for clip, group in enumerate(groups):
        for number, (ids, count) in enumerate(group.counts.items()):
            mask_BKL[clip, number, : len(ids)] = 1
            counts_BK[clip, number], rewards_BK[clip, number] = count, rewards[clip][ids]
            is_reference_BK[clip, number] = ids == group.reference
    sampled_N = [number for group in groups for ids in group.counts for number in group.log_probs[ids]]
    return Candidates(
        places_N=torch.from_numpy(np.flatnonzero(mask_BKL)),
        mask_BKL=torch.from_numpy(mask_BKL),
        counts_BK=torch.from_numpy(counts_BK),
        rewards_BK=torch.from_numpy(rewards_BK),
        is_reference_BK=torch.from_numpy(is_reference_BK),
        sampled_N=torch.tensor(sampled_N),
    )
