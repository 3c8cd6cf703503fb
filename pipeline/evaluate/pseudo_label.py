"""Pseudo-labels: a model's own translations of clips, written as a text column with its confidence in each.

A round of self-training is: train on labelled clips, label the others with the best model, train on both (the labels by
a weight of their own), and again. Labels below a confidence are left out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from pipeline.config.prompt_schema import text_columns
from pipeline.errors import RecipeError
from pipeline.evaluate.run import EvalRanks
from pipeline.inference.clips import CollatePrompts, FetchFrames, PromptBatch, check_poses, check_rows
from pipeline.inference.confidence import confidences
from pipeline.inference.cues import CueReader, check_cues, with_cues
from pipeline.inference.generate import GenerationOptions, check_fits, translate_batch
from pipeline.inference.load import Precision, load_export
from shards.atomic import write_atomic
from shards.errors import DataError
from shards.format.index import ShardSet, open_index
from shards.format.text_columns import new_column_path, write_column
from shards.load.loader import EvalLoader
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan

Label = tuple[int, str, float]
"""(row of the index, text, confidence)."""


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """What to label and how."""

    column: str = "pseudo_label"
    """Name of the text column."""
    split: str = "train"
    corpus: str | None = None
    """Only samples of this corpus; default all."""
    min_score: float = 0.0
    """Least confidence, 0 to 1; samples below it get no label."""
    replace: bool = False
    """Whether an existing column may be replaced."""
    micro_batch: int = 8
    """Samples translated at once per rank."""
    workers: int = 0
    """Loader processes per rank."""
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    device: str = "cpu"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise RecipeError(f"--min-score {self.min_score:g}: confidences lie between 0 and 1.")


@dataclass(frozen=True, slots=True)
class LabelReport:
    """What became of the samples."""

    samples: int
    """Of the split, without the other ones."""
    labelled: int
    below_min_score: int
    without_text: int
    """Empty translations."""
    mean_score: float
    """Of those that are labelled."""


def pseudo_label(
    export_dir: Path,
    shards: Path,
    options: LabelOptions,
    ranks: EvalRanks | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LabelReport | None:
    """Translate a split and write the translations as a text column of its shard set.

    Args:
        export_dir: folder written by `slt export`.
        shards: shard set on disk, of videos or of the model's own features; its samples need no texts.
        options: what to label and how.
        ranks: this process's share; all ranks must call.
        on_progress: called with this rank's finished and total samples.

    Returns:
        The counts on rank 0, None on the others.

    Raises:
        CheckpointError: the export cannot be used.
        DataError: the shards cannot be read, a sample is damaged, or a rank left no labels.
        OptionError: the column exists, or its name cannot be one.
    """
    ranks, shard_set = ranks or EvalRanks(), open_index(shards)
    new_column_path(shard_set, options.column, options.replace)  # refused before anything is translated
    model, processor = load_export(export_dir, options.device, options.precision)
    check_fits(model, processor, options.generation, str(export_dir))
    sizes = processor.options
    plan = Plan(
        [Source(shard_set, options.split, options.corpus, columns=text_columns(sizes.prompt, sizes.prompts, False))],
        PlanOptions("clip", shuffle=False, max_frames=sizes.max_frames, frame_stride=sizes.frame_stride),
    )
    check_cues(plan, CueReader(sizes), train=False)
    check_rows(plan, model.visual.config)
    check_poses(None, model.visual.config, "this command takes none")
    loader = EvalLoader(
        plan, with_cues(FetchFrames(sizes.max_frames, sizes.frame_stride, sizes.image_pixels), processor),
        CollatePrompts(processor, model.visual.config.clip_sizes()), rank=ranks.rank, world_size=ranks.world_size,
        micro_batch=options.micro_batch, workers=options.workers,
    )  # fmt: skip
    labels: list[Label] = []
    for batch, samples in cast(Iterator[tuple[PromptBatch, list[int]]], loader.padded()):
        texts = translate_batch(model, processor, batch, options.generation)
        sure = confidences(model, processor, batch, texts)
        for sample, text, score in zip(samples, texts, sure, strict=False):
            labels.append((plan.samples.place(sample)[1], text, score))
        if on_progress is not None:
            on_progress(len(labels), len(range(ranks.rank, loader.n_items, ranks.world_size)))
    parts = shard_set.dir / f".{options.column}.labelling"
    parts.mkdir(exist_ok=True)
    write_atomic(_part(parts, ranks), json.dumps(labels).encode())
    ranks.barrier()
    if ranks.rank != 0:
        return None
    report = _write(shard_set, parts, ranks, options, export_dir)
    shutil.rmtree(parts)
    return report


def _part(parts: Path, ranks: EvalRanks) -> Path:
    return parts / f"{ranks.rank}-of-{ranks.world_size}.json"


def _write(shard_set: ShardSet, parts: Path, ranks: EvalRanks, options: LabelOptions, export_dir: Path) -> LabelReport:
    labels: list[Label] = []
    for rank in range(ranks.world_size):
        path = _part(parts, EvalRanks(rank, ranks.world_size))
        if not path.exists():
            raise DataError(
                f"rank {rank} of {ranks.world_size} left no labels", where=str(path), fix="look at that rank's log"
            )
        labels += [(int(row), str(text), float(score)) for row, text, score in json.loads(path.read_bytes())]
    texts: list[list[str]] = [[] for _ in range(len(shard_set))]
    scores: list[list[float]] = [[] for _ in range(len(shard_set))]
    empty = below = 0
    for row, text, score in labels:
        if not text.strip():
            empty += 1
        elif score < options.min_score:
            below += 1
        else:
            texts[row], scores[row] = [text], [score]
    kept = [score for row in scores for score in row]
    about = {
        "model": str(export_dir), "split": options.split, "min_score": options.min_score,
        "generation": options.generation.to_dict(),
    }  # fmt: skip
    write_column(shard_set, options.column, texts, about, scores, options.replace)
    return LabelReport(len(labels), len(kept), below, empty, float(np.mean(kept)) if kept else 0.0)
