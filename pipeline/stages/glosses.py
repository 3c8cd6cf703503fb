"""What the contrastive stage tells its model of a clip's glosses, and what it refuses.

Legend: B clips, N glosses of all of them, or tokens of these glosses as texts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypedDict

import numpy as np
import torch

from pipeline.config.schema import ContrastiveConfig, ModelConfig
from pipeline.config.supervision_schema import CtcConfig
from pipeline.errors import DataError, RecipeError
from pipeline.evaluate.word_errors import word_errors
from pipeline.inference.clips import Clip, Clips
from pipeline.losses.gloss import words_needed
from pipeline.models.exported import HEADS, init_folders
from pipeline.models.gloss_vocabulary import VOCABULARY_NAME, GlossVocabulary
from pipeline.models.text_cache import TextFeatureCache
from pipeline.models.visual import HierarchicalVisualEncoder
from shards.load.reader import SampleReader
from shards.order.options import kept_frames
from shards.order.plan import Plan
from shards.schema import IndexRow, text_hash

log = logging.getLogger(__name__)

FIX = (
    "keep more frames (data.max_frames, data.frame_stride), lower model.visual.word.stride, or leave such clips out of "
    "the loss with contrastive.ctc.unusable: leave_out"
)


Recognised = tuple[list[str], list[str]]
"""Glosses that were read in a clip, and those it has."""


class GlossBatch(TypedDict, total=False):
    """What a micro-batch says of glosses, as far as the recipe uses them."""

    gloss_classes_N: torch.Tensor
    """int64, of `GlossVocabulary`."""
    gloss_lengths: list[int]
    """Glosses of every clip; 0 = it is left out."""
    gloss_ids_B: torch.Tensor
    """int64, `shards.schema.text_hash` of the glosses as a text."""
    gloss_tokens_ND: torch.Tensor
    """Token features of these texts, float32."""
    gloss_token_lengths: list[int]
    frame_lengths: list[int]
    """Of every clip, on the host."""


@dataclass(frozen=True, slots=True)
class GlossTargets:
    """Glosses of clips -> classes of the gloss head. Picklable."""

    vocabulary: GlossVocabulary
    config: CtcConfig

    @classmethod
    def of(cls, plan: Plan, encoder: HierarchicalVisualEncoder, config: ContrastiveConfig) -> Self:
        """With the vocabulary of a training plan, all of whose clips are looked through.

        Raises:
            RecipeError: no clip has glosses.
            DataError: a clip is unusable, and the recipe does not leave it out.
        """
        texts = gloss_texts(plan, config.glosses)
        vocabulary = GlossVocabulary.of(texts)
        if not vocabulary.glosses:
            raise RecipeError(
                f"contrastive.ctc: no sample of data.train has glosses (contrastive.glosses={config.glosses}); train on"
                " a corpus that has them, or set contrastive.ctc.weight and set_weight to 0"
            )
        targets = cls(vocabulary, config.ctc)
        stored = plan.samples.columns["frames"][np.arange(len(plan.samples))]
        frames = kept_frames(stored, plan.options.max_frames, plan.options.frame_stride)
        words = [encoder.config.word_count(count) for count in frames.tolist()]
        problems = [
            (sample, problem)
            for sample, (text, count) in enumerate(zip(texts, words, strict=True))
            if (problem := targets.problem(text.split(), count))
        ]
        log.info("%d glosses; %d of %d clips are unusable", len(vocabulary.glosses), len(problems), len(words))
        if problems and config.ctc.unusable == "error":
            sample, problem = problems[0]
            row = plan.samples.row(sample)
            raise DataError(f"{problem} ({len(problems)} of {len(words)} clips are so)", where=where(row), fix=FIX)
        return targets

    def problem(self, glosses: Sequence[str], words: int) -> str:
        """Why CTC cannot use a clip of so many word tokens; empty if it can."""
        if not glosses:
            return "no glosses"
        needed = words_needed(glosses, self.config.order == "video")
        if needed <= words:
            return ""
        return f"{len(glosses)} glosses need {needed} word tokens, the clip has {words}"

    def batch(self, rows: Sequence[IndexRow], words: Sequence[int]) -> GlossBatch:
        """Of these clips, with so many word tokens each.

        Raises:
            DataError: a clip is unusable, and the recipe does not leave it out.
        """
        classes = [self._classes(row, count) for row, count in zip(rows, words, strict=True)]
        return {
            "gloss_classes_N": torch.tensor([number for own in classes for number in own], dtype=torch.int64),
            "gloss_lengths": [len(own) for own in classes],
        }

    def recognised(self, features: Mapping[str, torch.Tensor], batch: Mapping[str, Any]) -> list[Recognised]:
        """What the gloss head reads in every clip of a micro-batch, and its glosses."""
        found = self.vocabulary.decode(features["glosses_MV"], batch["word_lengths"])
        return [(own, row.gloss.split()) for own, row in zip(found, batch["rows"], strict=True)]

    def _classes(self, row: IndexRow, words: int) -> list[int]:
        glosses = row.gloss.split()
        if problem := self.problem(glosses, words):
            if self.config.unusable == "leave_out":
                return []
            raise DataError(problem, where=where(row), fix=FIX)
        return self.vocabulary.classes(glosses)


@dataclass(frozen=True, slots=True)
class AlignedGlosses:
    """Glosses of clips as texts of their own. Picklable."""

    texts: TextFeatureCache

    def batch(self, rows: Sequence[IndexRow], clips: Clips) -> GlossBatch:
        """Of these clips."""
        hashes = [text_hash(" ".join(row.gloss.split())) for row in rows]
        found = self.texts.lookup(hashes)
        return {
            "gloss_ids_B": torch.tensor(hashes, dtype=torch.int64),
            "gloss_tokens_ND": found.tokens_ND,
            "gloss_token_lengths": found.lengths,
            "frame_lengths": clips["frame_lengths_B"].tolist(),
        }


def check_warm_start(model: ModelConfig, vocabulary: GlossVocabulary) -> None:
    """Refuse the gloss head of an export that tells other glosses apart: its classes would mean others here.

    Raises RecipeError for `model.init_from` with heads of another vocabulary.
    """
    folder = init_folders(model).get(HEADS)
    if folder is None or not (folder / VOCABULARY_NAME).is_file():
        return
    theirs = GlossVocabulary.load(folder)
    if theirs != vocabulary:
        known = len(set(theirs.glosses) & set(vocabulary.glosses))
        raise RecipeError(
            f"model.init_from: the gloss head of {folder} tells {len(theirs.glosses)} glosses apart, this run"
            f" {len(vocabulary.glosses)}, of which {known} are the same; take only `visual` from that export, or train"
            " on the same glosses"
        )


def aligned_texts(plan: Plan, source: str) -> Iterator[str]:
    """The glosses of a training plan as texts, equal ones once.

    Raises:
        DataError: a clip has none.
    """
    texts = [" ".join(text.split()) for text in gloss_texts(plan, source)]
    if absent := texts.count(""):
        raise DataError(
            f"no glosses to align with ({absent} of {len(texts)} clips have none)",
            where=where(plan.samples.row(texts.index(""))),
            fix="leave these clips out of data.train, or set contrastive.alignment's weights to 0",
        )
    yield from dict.fromkeys(texts)


def gloss_metrics(recognised: Sequence[Recognised]) -> dict[str, float]:
    """``wer`` over the clips that have glosses; nothing if none has."""
    known = [pair for pair in recognised if pair[1]]
    return {"wer": word_errors(*zip(*known, strict=True)).wer} if known else {}


IN_INDEX = "gloss"
"""The `contrastive.glosses` that is a column of the index; all others are text columns."""


def gloss_texts(plan: Plan, source: str) -> list[str]:
    """The glosses of every sample, from `contrastive.glosses`."""
    if source == IN_INDEX:
        texts: list[str] = plan.samples.column(IN_INDEX).to_pylist()
        return texts
    return [" ".join(plan.samples.texts(source, sample)) for sample in range(len(plan.samples))]


@dataclass(frozen=True, slots=True)
class FetchWithGlosses:
    """Clips whose index rows hold the glosses of a text column as theirs; runs in loader processes."""

    fetch: Callable[[SampleReader, np.ndarray], list[Clip]]
    column: str

    @property
    def draws(self) -> bool:
        """Whether the clips draw random numbers (:mod:`shards.load.substitute`)."""
        return bool(getattr(self.fetch, "draws", False))

    def __call__(self, reader: SampleReader, item: np.ndarray) -> list[Clip]:
        texts = [" ".join(reader.plan.samples.texts(self.column, int(sample))) for sample in item["sample"]]
        clips = zip(self.fetch(reader, item), texts, strict=True)
        return [(frames, row._replace(gloss=gloss)) for (frames, row), gloss in clips]


def where(row: IndexRow) -> str:
    """A clip in words."""
    return f"{row.corpus}/{row.sample_id} ({row.shard})"
