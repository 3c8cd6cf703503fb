"""Evaluate an exported model on shard sets: translate every sample once over all ranks, merge by sample id, score.

Ranks meet only in a barrier: each writes its predictions to a file and the first one joins them, so an evaluation
cannot deadlock on uneven shares and never scores a sample twice.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import cast

from pipeline.config.prompt_schema import text_columns
from pipeline.errors import RecipeError
from pipeline.evaluate.in_turn import Turns, translate_in_turn, turns_of
from pipeline.evaluate.metrics import Scores, score
from pipeline.evaluate.protocols import get_protocol
from pipeline.evaluate.report import merge_predictions, write_part, write_predictions, write_scores
from pipeline.inference.clips import CollatePrompts, FetchFrames, PromptBatch, check_poses, check_rows
from pipeline.inference.cues import CueReader, check_cues, with_cues
from pipeline.inference.generate import GenerationOptions, Prediction, check_fits, translate
from pipeline.inference.load import Precision, load_export
from pipeline.inference.references import texts_of_sample
from pipeline.models.processing import LlavaSltProcessor
from pipeline.models.training_texts import warn_of_known_texts
from pipeline.models.visual import VisualEncoderConfig
from shards.exchange.previous import IDS
from shards.format.index import ShardSet, open_index
from shards.load.beside import Beside
from shards.load.loader import EvalLoader
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan

logger = logging.getLogger(__name__)
_Batches = Iterator[tuple[PromptBatch, list[int]]]


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What to score and how."""

    split: str = "test"
    corpus: str | None = None
    """Only samples of this corpus; default all."""
    pose: list[Path] = field(default_factory=list)
    """Shard sets with the keypoints of the same samples, for a model that reads them beside frames."""
    references: str | None = None
    """Text columns of the shard sets, separated by commas, whose texts are references too (`slt shards texts`)."""
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
    previous: str | None = None
    """What `{previous}` shows: reference | predicted; None = as the model's recipe says."""

    def reference_columns(self) -> tuple[str, ...]:
        """The names in ``references``."""
        return tuple(self.references.split(",")) if self.references else ()


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
    processor = _with_source(processor, options.previous)
    beside = _beside(options, model.visual.config)
    loader = _loader(sets, CollatePrompts(processor, model.visual.config.clip_sizes()), beside, options, ranks)
    check_cues(loader.plan, CueReader(processor.options), train=False)
    check_rows(loader.plan, model.visual.config)
    if beside is not None:
        beside.check(loader.plan)
    count = _counter(len(range(ranks.rank, loader.n_items, ranks.world_size)), on_progress)
    turns = turns_of(loader, expected_keys(loader), processor) if _predicted(processor) else None
    if turns is not None:
        predictions = translate_in_turn(model, processor, loader, turns, options.generation, count)
    else:
        predictions = translate(model, processor, cast(_Batches, loader.padded()), options.generation, count)
    write_part(out_dir, ranks.rank, ranks.world_size, predictions)
    ranks.barrier()
    if ranks.rank != 0:
        return None
    merged = merge_predictions(out_dir, ranks.world_size, expected_keys(loader))
    scores = score([p.hypothesis for p in merged], references_of(loader, merged, options.reference_columns()), protocol)
    write_predictions(out_dir, merged, protocol)
    known = warn_of_known_texts(export_dir, [p.reference for p in merged])
    about = {"model": str(export_dir), "known_texts": known, **_about(sets, loader, options)}
    path = write_scores(out_dir, scores, {**about, **_about_prompt(processor, turns)})
    logger.info("scores of %d samples in %s", scores.samples, path)
    return scores


def references_of(loader: EvalLoader, predictions: Sequence[Prediction], columns: Sequence[str]) -> list[list[str]]:
    """All references of the predictions, which are in the order of the split; ``columns`` hold those beside its own."""
    samples = loader.plan.samples
    numbers = loader.plan.epoch(0).elements["sample"].tolist()
    return [texts_of_sample(samples, n, p.reference, columns) for n, p in zip(numbers, predictions, strict=False)]


def _counter(total: int, on_progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """Adds up the samples of each batch."""
    done = 0

    def count(samples: int) -> None:
        nonlocal done
        done += samples
        if on_progress is not None:
            on_progress(done, total)

    return count


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
    columns = (*options.reference_columns(), *text_columns(sizes.prompt, sizes.prompts, train=False))
    predicted = _predicted(collate.processor)
    columns += (sizes.prompts.previous.column + IDS,) if predicted else ()
    frames = FetchFrames(sizes.max_frames, sizes.frame_stride, sizes.image_pixels, beside=beside)
    plan = Plan(
        [Source(shard_set, options.split, options.corpus, columns=columns) for shard_set in sets],
        PlanOptions("clip", shuffle=False, max_frames=sizes.max_frames, frame_stride=sizes.frame_stride),
    )
    return EvalLoader(
        plan,
        frames if predicted else with_cues(frames, collate.processor),
        collate,
        rank=ranks.rank,
        world_size=ranks.world_size,
        micro_batch=options.micro_batch,
        max_samples=options.max_samples,
        workers=options.workers,
    )


def _predicted(processor: LlavaSltProcessor) -> bool:
    """Whether the prompt shows the model's own translations of the sentences before."""
    return "previous" in processor.cues and processor.options.prompts.previous.source == "predicted"


def _with_source(processor: LlavaSltProcessor, source: str | None) -> LlavaSltProcessor:
    """The processor whose prompt shows the sentences before from this source. Raises RecipeError for another one."""
    if source is None:
        return processor
    if source not in ("reference", "predicted") or "previous" not in processor.cues:
        raise RecipeError(
            f"--set previous={source}: give reference or predicted, for a model whose prompt shows {{previous}}; this"
            f" one's is {processor.options.prompt!r}."
        )
    prompts = processor.options.prompts
    changed = prompts.model_copy(update={"previous": prompts.previous.model_copy(update={"source": source})})
    return LlavaSltProcessor(processor.tokenizer, dataclasses.replace(processor.options, prompts=changed))


def _about_prompt(processor: LlavaSltProcessor, turns: Turns | None) -> dict[str, object]:
    """What the prompt showed besides the video, and where it came from."""
    prompts, shown = processor.options.prompts, processor.cues
    said = {
        "previous": {"reference": "references", "predicted": "the model's own translations"}[prompts.previous.source],
        "gloss": "left out" if prompts.gloss.held_out == "empty" else f"{prompts.gloss.source}, made of references",
        "example": f"the first {prompts.example.count} of the model's examples",
    }
    outside = {} if turns is None else {"previous_outside_the_split_as_references": turns.references()}
    if not shown:
        return {}
    values = {name: said.get(name, "the sample's") for name in shown}
    return {"prompt": {"template": processor.options.prompt, **values, **outside}}


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
        "references": options.references,
        "samples_in_split": loader.plan.items_per_epoch,
        "generation": options.generation.to_dict(),
        "environment": {name: version(name) for name in ("torch", "transformers")},
    }
