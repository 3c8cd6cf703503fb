"""Slices of packs, by hand: nothing is lost between them, and nothing is counted twice."""

from __future__ import annotations

import pickle

import torch

from pipeline.stages.batches import PackCollate
from pipeline.stages.slices import SliceCollate
from tests.unit.pipeline.stages.test_batches import PAD, documents

ITEMS = [documents((3, 10), (2, 20)), documents((8, 30))]


def test_slices_by_hand() -> None:
    packs = PackCollate(block_tokens=8, pad_id=PAD)
    first, second = (SliceCollate(packs, rank, 2)(ITEMS) for rank in (0, 1))
    assert first["input_ids_BL"].tolist() == [[10, 11, 12, 20], [30, 31, 32, 33]]
    assert second["input_ids_BL"].tolist() == [[21, PAD, PAD, PAD], [34, 35, 36, 37]]
    assert first["targets_BL"].tolist() == [[11, 12, -100, 21], [31, 32, 33, 34]], "the last one is in the next slice"
    assert second["targets_BL"].tolist() == [[-100] * 4, [35, 36, 37, -100]]
    assert first["packed"]["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert second["packed"]["position_ids"].tolist() == [[1, 0, 1, 2], [4, 5, 6, 7]]
    for part in (first, second):
        assert part["packed"]["documents"].borders.tolist() == [0, 3, 5, 8, 16], "borders of whole rows"
        assert part["packed"]["documents"].longest == 8
        assert part["document_lengths"].tolist() == [3, 2, 8]
    assert (first["valid_tokens"], second["valid_tokens"]) == (7, 3) and first["samples"] == 3 != second["samples"]


def test_slices_together_are_the_whole_batch() -> None:
    packs = PackCollate(block_tokens=12, pad_id=PAD)
    whole = packs(ITEMS)
    parts = [pickle.loads(pickle.dumps(SliceCollate(packs, rank, 3)))(ITEMS) for rank in range(3)]
    for name in ("input_ids_BL", "targets_BL"):
        assert torch.equal(torch.cat([part[name] for part in parts], 1), whole[name])
    for name in ("valid_tokens", "samples"):
        assert sum(part[name] for part in parts) == whole[name]
