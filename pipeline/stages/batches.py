"""What each stage's micro-batches hold, and how they are made from raw samples: by picklable callables without a
model, in loader workers.

Shape suffixes: B items of the micro-batch, L tokens, D documents of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch

from pipeline.inference.clips import Clip, Clips, CollatePrompts, PromptBatch, pack_clips
from pipeline.inference.cues import apart
from pipeline.losses import IGNORE_LABEL
from pipeline.models.attention import Packed, packed_kwargs
from pipeline.models.clip_layout import ClipSizes
from pipeline.models.packed_row import PackedRow
from pipeline.models.processing import LlavaSltProcessor
from pipeline.models.text_cache import TextFeatureCache
from pipeline.stages.glosses import AlignedGlosses, GlossBatch, GlossTargets
from shards.load.documents import Pack
from shards.load.reader import SampleReader
from shards.schema import text_hash

T = TypeVar("T")


class MicroBatch(TypedDict):
    """What the trainer counts in every stage's micro-batches."""

    valid_tokens: int
    """Label tokens (or samples) that the micro-batch's loss sums over."""
    samples: int
    maxima: dict[str, int]
    """Numbers of the host whose largest, over micro-batches and ranks, the loss needs; the same names on every rank."""


class PackedBatch(MicroBatch):
    """Rows of packed documents."""

    input_ids_BL: torch.Tensor
    targets_BL: torch.Tensor
    """The token after each; -100 where none is predicted."""
    packed: Packed
    document_lengths: torch.Tensor
    """int64 [documents of all rows]."""


class ContrastiveBatch(Clips, MicroBatch, GlossBatch):
    """Clips with the identity of their texts, and with their glosses where the recipe uses them."""

    text_ids_B: torch.Tensor
    """int64, `shards.schema.text_hash`."""
    text_BD: torch.Tensor
    """Sentence features of the texts, float32."""
    tokens_ND: torch.Tensor
    """Token features of the texts, float32, one text after another."""
    token_lengths: list[int]
    word_lengths: list[int]


class TranslationBatch(Clips, PackedRow, MicroBatch):
    """Clips, and their tokenised prompts and answers packed into one row."""


class SequenceBatch(PromptBatch, MicroBatch):
    """Clips with prompts to translate from, and their references."""

    prompts: list[list[int]]
    """Ids of each clip's prompt, without padding."""
    references: list[list[int]]
    """Ids of each clip's text as an answer, with its eos."""


def fetch_pack(reader: SampleReader, item: np.ndarray) -> list[Pack]:
    """One pack: its documents one after another."""
    return [reader.pack(item)]


@dataclass(frozen=True, slots=True)
class PackCollate:
    """Packs -> fixed [B, block] rows. Targets are -100 at the last token of every document and on padding, so
    that no token is predicted from another document; the padded tail is a separate document."""

    block_tokens: int
    pad_id: int

    def __call__(self, items: list[list[Pack]]) -> PackedBatch:
        """``items``: the packs of every row, more than one if a document was replaced."""
        shape = (len(items), self.block_tokens)
        ids_BL = np.full(shape, self.pad_id, dtype=np.int64)
        targets_BL = np.full(shape, IGNORE_LABEL, dtype=np.int64)
        documents_BL = np.full(shape, -1, dtype=np.int64)
        for ids_L, targets_L, documents_L, packs in zip(ids_BL, targets_BL, documents_BL, items, strict=True):
            lengths_D = np.concatenate([pack.lengths for pack in packs])
            ends_D = np.cumsum(lengths_D)
            filled = int(ends_D[-1])
            np.concatenate([pack.ids for pack in packs], out=ids_L[:filled])
            targets_L[: filled - 1] = ids_L[1:filled]
            targets_L[ends_D - 1] = IGNORE_LABEL
            documents_L[:filled] = np.repeat(np.arange(len(lengths_D)), lengths_D)
        lengths = np.concatenate([pack.lengths for packs in items for pack in packs])
        return {
            "input_ids_BL": torch.from_numpy(ids_BL),
            "targets_BL": torch.from_numpy(targets_BL),
            "packed": packed_kwargs(torch.from_numpy(documents_BL)),
            "document_lengths": torch.from_numpy(lengths),
            "valid_tokens": int((targets_BL != IGNORE_LABEL).sum()),
            "samples": len(lengths),
            "maxima": {},
        }


@dataclass(frozen=True, slots=True)
class ContrastiveCollate:
    """Clips with the frozen features of their texts; in training with what is told of their glosses."""

    sizes: ClipSizes
    texts: TextFeatureCache
    targets: GlossTargets | None = None
    aligned: AlignedGlosses | None = None
    several: bool = False
    """Whether rows may hold another text of their sample than the index does."""

    def __call__(self, items: list[list[Clip]]) -> ContrastiveBatch:
        clips = pack_clips(items, self.sizes)
        hashes = [row.text_hash for row in clips["rows"]]
        texts = self.texts.lookup([text_hash(row.text) for row in clips["rows"]] if self.several else hashes)
        words = clips["layout"].word_lengths_B.tolist()
        glosses: GlossBatch = {}
        if self.targets is not None:
            glosses |= self.targets.batch(clips["rows"], words)
        if self.aligned is not None:
            glosses |= self.aligned.batch(clips["rows"], clips)
        return {
            **clips,
            **glosses,
            "text_ids_B": torch.tensor(hashes, dtype=torch.int64),
            "text_BD": texts.text_BD,
            "tokens_ND": texts.tokens_ND,
            "token_lengths": texts.lengths,
            "word_lengths": words,
            "valid_tokens": len(hashes),
            "samples": len(hashes),
            "maxima": {},
        }


@dataclass(frozen=True, slots=True)
class TranslationCollate:
    """Clips with tokenised prompts and answers, each sample a document of one packed row."""

    processor: LlavaSltProcessor
    sizes: ClipSizes

    def __call__(self, items: list[list[Any]]) -> TranslationBatch:
        """``items``: what the fetch of `with_cues` gives."""
        items, cues = apart(items, self.processor)
        clips = pack_clips(items, self.sizes)
        row = self.processor.pack(clips["frame_lengths_B"].tolist(), [row.text for row in clips["rows"]], cues)
        valid = len(row["answers"]["targets_N"])
        return {**clips, **row, "valid_tokens": valid, "samples": len(clips["rows"]), "maxima": {}}


@dataclass(frozen=True, slots=True)
class SequenceCollate:
    """Clips with left padded prompts, and the tokens of their texts."""

    processor: LlavaSltProcessor
    sizes: ClipSizes

    def __call__(self, items: list[list[Any]]) -> SequenceBatch:
        """``items``: what the fetch of `with_cues` gives."""
        batch = CollatePrompts(self.processor, self.sizes)(items)
        padded = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        return {
            **batch,
            "prompts": [ids_L[mask_L > 0].tolist() for ids_L, mask_L in padded],
            "references": [self.processor.answer_ids(row.text) for row in batch["rows"]],
            "valid_tokens": len(batch["rows"]),
            "samples": len(batch["rows"]),
            "maxima": {},
        }


def map_tensors(batch: T, function: Callable[[torch.Tensor], Any]) -> T:
    """A (nested) micro-batch, or a list of them, with its tensors replaced; the rest stays."""
    mapped: Any = batch
    if isinstance(batch, torch.Tensor):
        mapped = function(batch)
    elif isinstance(batch, dict):
        mapped = {key: map_tensors(value, function) for key, value in batch.items()}
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        mapped = type(batch)(*(map_tensors(value, function) for value in batch))
    elif isinstance(batch, list) and batch and isinstance(batch[0], dict):
        mapped = [map_tensors(value, function) for value in batch]
    return mapped


def to_device(batch: T, device: torch.device) -> T:
    """A (nested) micro-batch with its tensors moved without blocking, the rest unchanged."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
