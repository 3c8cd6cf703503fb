"""The micro-batches of ranks that compute sequences together: the same packs on every rank, a slice of each."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.losses import IGNORE_LABEL
from pipeline.stages.batches import PackCollate, PackedBatch
from shards.load.documents import Pack


@dataclass(frozen=True, slots=True)
class SliceCollate:
    """Packs -> positions ``rank * L`` to ``rank * L + L - 1`` of their rows, L = block / ``size``.

    Targets are the next tokens of the whole row, so none is lost between slices; the document borders are those of the
    whole rows, which attention sees. Only the first slice counts the samples.
    """

    packs: PackCollate
    rank: int
    size: int

    def __call__(self, items: list[list[Pack]]) -> PackedBatch:
        whole = self.packs(items)
        length = self.packs.block_tokens // self.size
        own = slice(self.rank * length, (self.rank + 1) * length)
        targets_BL = whole["targets_BL"][:, own].contiguous()
        return {
            **whole,
            "input_ids_BL": whole["input_ids_BL"][:, own].contiguous(),
            "targets_BL": targets_BL,
            "packed": {**whole["packed"], "position_ids": whole["packed"]["position_ids"][:, own].contiguous()},
            "valid_tokens": int((targets_BL != IGNORE_LABEL).sum()),
            "samples": 0 if self.rank else whole["samples"],
        }
