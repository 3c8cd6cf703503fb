"""Raw samples -> micro-batches, run in loader workers: picklable callables without a model.

Shape suffixes: B items of the micro-batch, L tokens, D documents of a row, N frames packed over samples, H W C image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.errors import RecipeError
from pipeline.inference.clips import check_fingerprints, holds_features
from pipeline.losses import IGNORE_LABEL
from pipeline.models.attention import packed_kwargs
from pipeline.models.processing import LlavaSltProcessor
from pipeline.models.visual import HierarchicalVisualEncoder
from shards.load.documents import Pack
from shards.load.reader import SampleReader
from shards.order.plan import Plan


def fetch_pack(reader: SampleReader, item: np.ndarray) -> list[Pack]:
    """One pack: its documents one after another."""
    return [reader.pack(item)]


@dataclass(frozen=True, slots=True)
class PackCollate:
    """Packs -> fixed [B, block] rows. Labels are -100 on the first token of every document and on padding, so
    that no token is predicted from another document; the padded tail is a document of its own."""

    block_tokens: int
    pad_id: int

    def __call__(self, items: list[list[Pack]]) -> dict[str, Any]:
        """``items``: of every row its packs, more than one where a document was replaced."""
        shape = (len(items), self.block_tokens)
        ids_BL = np.full(shape, self.pad_id, dtype=np.int64)
        labels_BL = np.full(shape, IGNORE_LABEL, dtype=np.int64)
        documents_BL = np.full(shape, -1, dtype=np.int64)
        for ids_L, labels_L, documents_L, packs in zip(ids_BL, labels_BL, documents_BL, items, strict=True):
            lengths_D = np.concatenate([pack.lengths for pack in packs])
            ends_D = np.cumsum(lengths_D)
            filled = int(ends_D[-1])
            np.concatenate([pack.ids for pack in packs], out=ids_L[:filled])
            labels_L[:filled] = ids_L[:filled]
            labels_L[ends_D - lengths_D] = IGNORE_LABEL
            documents_L[:filled] = np.repeat(np.arange(len(lengths_D)), lengths_D)
        lengths = np.concatenate([pack.lengths for packs in items for pack in packs])
        return {
            "input_ids_BL": torch.from_numpy(ids_BL),
            "labels_BL": torch.from_numpy(labels_BL),
            "packed": packed_kwargs(torch.from_numpy(documents_BL)),
            "document_lengths": torch.from_numpy(lengths),
            "valid_tokens": int((labels_BL != IGNORE_LABEL).sum()),
            "samples": len(lengths),
        }


def check_features(plan: Plan, encoder: HierarchicalVisualEncoder) -> None:
    """Refuse stored frame features that are not what this encoder's frozen backbone would compute.

    Raises RecipeError when the backbone trains, or the features come from another backbone or preprocessing.
    """
    if not holds_features(plan):
        return
    if encoder.backbone.trains:
        raise RecipeError(
            f"{plan.sources[0].shard_set.dir}: these shards hold frame features, but model.visual.backbone.train lets"
            " the backbone change; set it to frozen, or train on the video shards."
        )
    check_fingerprints(plan, encoder.config.backbone_fingerprint)


def clip_tensors(items: list[list[tuple[np.ndarray, Any]]]) -> dict[str, Any]:
    """(frames or features, index row) of every clip -> packed over the samples of the micro-batch, and the rows."""
    clips = [clip for item in items for clip in item]
    return {
        "frames_NHWC": torch.from_numpy(np.concatenate([frames_THWC for frames_THWC, _ in clips])),
        "frame_lengths_B": torch.tensor([len(frames_THWC) for frames_THWC, _ in clips]),
        "rows": [row for _, row in clips],
        "text_ids_B": torch.tensor([row.text_hash for _, row in clips], dtype=torch.int64),
        "samples": len(clips),
    }


@dataclass(frozen=True, slots=True)
class ContrastiveCollate:
    """Clips with the identity of their texts; the text features come from the frozen-text cache."""

    def __call__(self, items: list[list[tuple[np.ndarray, Any]]]) -> dict[str, Any]:
        batch = clip_tensors(items)
        return {**batch, "valid_tokens": batch["samples"]}


@dataclass(frozen=True, slots=True)
class TranslationCollate:
    """Clips with tokenised prompt and answer; labels are the answer and its eos."""

    processor: LlavaSltProcessor

    def __call__(self, items: list[list[tuple[np.ndarray, Any]]]) -> dict[str, Any]:
        batch = clip_tensors(items)
        tokens = self.processor(batch["frame_lengths_B"].tolist(), [row.text for row in batch["rows"]])
        return {**batch, **tokens, "valid_tokens": int((tokens["labels"][:, 1:] != IGNORE_LABEL).sum())}
