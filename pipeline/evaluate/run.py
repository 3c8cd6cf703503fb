"""Evaluate an exported model on shard sets: translate every sample once over all ranks, merge by sample id, score.

Ranks meet only in a barrier: each writes its predictions to a file and the first one joins them, so an evaluation
cannot deadlock on uneven shares and never scores a sample twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import cast

from pipeline.evaluate.metrics import Scores, score
from pipeline.evaluate.protocols import get_protocol
from pipeline.evaluate.report import merge_predictions, write_part, write_predictions, write_scores
from pipeline.inference.clips import CollatePrompts, FetchFrames, PromptBatch, check_poses, check_rows
from pipeline.inference.generate import GenerationOptions, check_fits, translate
from pipeline.inference.load import Precision, load_export
from pipeline.models.training_texts import warn_of_known_texts
from pipeline.models.visual import VisualEncoderConfig
from shards.format.index import ShardSet, open_index
from shards.load.beside import Beside
from shards.load.loader import EvalLoader
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What to score and how."""

    split: str = "test"
    corpus: str | None = None
    """Only samples of this corpus; default all."""
    pose: list[Path] = field(default_factory=list)
    """Shard sets with the keypoints of the same samples, for a model that reads them beside frames."""
    protocol: str = "default"
    """Name in `pipeline.evaluate.protocols`."""
    micro_batch: int = 8
    """Samples translated at once per rank."""
    max_samples: int = 0
    """Only the first samples of the split; 0 = all."""
    workers: int = 0
    """Loader processes per rank."""
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    device: str = "cpu"
    precision: Precision = "auto"


def _no_barrier() -> None:
    """Barrier of a single process."""


@dataclass(frozen=True, slots=True)
class EvalRanks:
    """This process's share of the samples."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], None] = _no_barrier


def evaluate_export(
    export_dir: Path,
    shards: Sequence[Path],
    out_dir: Path,
    options: EvaluateOptions,
    ranks: EvalRanks | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores | None:
    """Translate a split with an exported model and score it.

    Writes ``predictions.parquet``, ``predictions.tsv`` and ``scores.json`` into ``out_dir`` (which all ranks must see).

    Args:
        export_dir: folder written by `slt export`.
        shards: video shard sets; their split is scored as one corpus.
        out_dir: where to write.
        options: what to score and how.
        ranks: this process's share; all ranks must call.
        on_progress: called with this rank's finished and total samples.

    Returns:
        The scores on rank 0, None on the others.

    Raises:
        RecipeError: unknown protocol (before anything is loaded), or stored features of another backbone.
        CheckpointError: the export cannot be used.
        DataError: shards that cannot be read, a damaged sample, or predictions that do not cover the split.
    """
    ranks, protocol = ranks or EvalRanks(), get_protocol(options.protocol)
    model, processor = load_export(export_dir, options.device, options.precision)
    check_fits(model, processor, options.generation, str(export_dir))
    sets = [open_index(path) for path in shards]
    beside = _beside(options, model.visual.config)
    loader = _loader(sets, CollatePrompts(processor, model.visual.config.clip_sizes()), beside, options, ranks)
    check_rows(loader.plan, model.visual.config)
    if beside is not None:
        beside.check(loader.plan)
    done = 0

    def count(samples: int) -> None:
        nonlocal done
        done += samples
        if on_progress is not None:
            on_progress(done, len(range(ranks.rank, loader.n_items, ranks.world_size)))

    batches = cast(Iterator[tuple[PromptBatch, list[int]]], loader.padded())
    predictions = translate(model, processor, batches, options.generation, count)
    write_part(out_dir, ranks.rank, ranks.world_size, predictions)
    ranks.barrier()
    if ranks.rank != 0:
        return None
    merged = merge_predictions(out_dir, ranks.world_size, expected_keys(loader))
    scores = score([p.hypothesis for p in merged], [p.reference for p in merged], protocol)
    write_predictions(out_dir, merged, protocol)
    known = warn_of_known_texts(export_dir, [p.reference for p in merged])
    about = {"model": str(export_dir), "known_texts": known, **_about(sets, loader, options)}
    path = write_scores(out_dir, scores, about)
    logger.info("scores of %d samples in %s", scores.samples, path)
    return scores


def _beside(options: EvaluateOptions, config: VisualEncoderConfig) -> Beside | None:
    """The keypoints that the model reads beside frames; None if it reads none."""
    sources = [Source(open_index(path), options.split, options.corpus) for path in options.pose]
    poses = Plan(sources, PlanOptions("clip", shuffle=False)) if sources else None
    check_poses(poses, config, "name their shards with --pose")
    return None if poses is None else Beside(poses)


def _loader(
    sets: list[ShardSet], collate: CollatePrompts, beside: Beside | None, options: EvaluateOptions, ranks: EvalRanks
) -> EvalLoader:
    """This rank's batches of the split, in the order of the shard sets."""
    sizes = collate.processor.options
    plan = Plan(
        [Source(shard_set, options.split, options.corpus) for shard_set in sets],
        PlanOptions("clip", shuffle=False, max_frames=sizes.max_frames, frame_stride=sizes.frame_stride),
    )
    return EvalLoader(
        plan,
        FetchFrames(sizes.max_frames, sizes.frame_stride, sizes.image_pixels, beside=beside),
        collate,
        rank=ranks.rank,
        world_size=ranks.world_size,
        micro_batch=options.micro_batch,
        max_samples=options.max_samples,
        workers=options.workers,
    )


def expected_keys(loader: EvalLoader) -> list[str]:
    """`Prediction.key` of every sample that the ranks translate together, in the order of the split."""
    samples = loader.plan.epoch(0).elements["sample"][: loader.n_items].tolist()  # clips: one element per item
    rows = (loader.plan.samples.row(sample) for sample in samples)
    return [f"{row.corpus}/{row.sample_id}" for row in rows]


def _about(sets: list[ShardSet], loader: EvalLoader, options: EvaluateOptions) -> dict[str, object]:
    return {
        "shards": {str(shard_set.dir): shard_set.fingerprint for shard_set in sets},
        "split": options.split,
        "corpus": options.corpus,
        "samples_in_split": loader.plan.items_per_epoch,
        "generation": options.generation.to_dict(),
        "environment": {name: version(name) for name in ("torch", "transformers")},
    }
