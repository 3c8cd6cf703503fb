"""Writing one shard of a build: prepared segments -> tar, index rows, skips and the part record."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.build.encoded import Stored, tally
from shards.build.layout import BuildOptions, ShardTask, work_units
from shards.build.prepare import PreparedRows, PreparedVideo, Skip, prepare_documents, prepare_rows, prepare_videos
from shards.build.work import Work, part_record
from shards.format.writer import TarWriter, add_documents, add_rows, add_video
from shards.schema import IndexRow, Kind, Segment
from shards.text import load_tokenizer, tokenise


@dataclass(frozen=True, slots=True)
class Finished:
    """The counts of one finished shard."""

    shard: str
    segments: int
    """Segments handled, without those a published filter excludes."""
    skips: list[Skip]
    bytes: int
    seconds: float
    """Duration of the stored videos."""


def preparer(options: BuildOptions, kind: Kind) -> Callable[[list[Segment]], list[Any]]:
    """The function that prepares one unit of segments; picklable."""
    if kind == "video":
        return functools.partial(prepare_videos, options=options.video, margin_seconds=options.margin_seconds)
    if kind == "features":
        assert options.rows is not None  # `build_identity` has needed it
        return functools.partial(prepare_rows, form=options.rows)
    return functools.partial(prepare_documents, tokenizer=options.tokenizer)


def build_shard(work: Work, task: ShardTask, sources: str, options: BuildOptions, kind: Kind) -> Finished:
    """Prepare and write one whole shard in this process."""
    prepare = preparer(options, kind)
    results = itertools.chain.from_iterable(prepare(unit) for unit in work_units(task, kind))
    return write_shard(work, task, sources, results, options)


def write_shard(work: Work, task: ShardTask, sources: str, results: Iterator[Any], options: BuildOptions) -> Finished:
    """Write a shard from one result per segment and keep it with its record.

    Args:
        sources: state of the media before they were read (``Sources.digest``).
        results: PreparedVideo, PreparedRows or Skip per segment, or token ids.
    """
    video = bool(task.segments) and task.segments[0].media is not None
    with work.scratch() as folder:
        with TarWriter(folder / task.name) as tar:
            stored = (_store_videos if video else _store_documents)(tar, task, results, options)
        work.store(tar, task.name, stored.rows, part_record(tar, stored, task, sources))
    return finished(task, stored.rows, stored.skips, tar.size)


def finished(task: ShardTask, rows: list[IndexRow], skips: list[Skip], size: int) -> Finished:
    """The counts of a shard from its rows and skips."""
    own = [skip for skip in task.skips if not skip.excluded]
    seconds = sum(row.duration_seconds for row in rows)
    return Finished(task.name, len(task.segments) + len(own), [*own, *skips], size if rows else 0, seconds)


def _store_videos(
    tar: TarWriter, task: ShardTask, results: Iterator[PreparedVideo | PreparedRows | Skip], options: BuildOptions
) -> Stored:
    stored = Stored([], [], collections.Counter())
    tokens = _text_tokens(task.segments, options.tokenizer)
    for segment, number, result in zip(task.segments, tokens, results, strict=True):
        if isinstance(result, Skip):
            stored.skips.append(result)
        elif isinstance(result, PreparedRows):
            stored.rows.append(add_rows(tar, segment, result.rows, result.rate, number))
        else:
            stored.rows.append(add_video(tar, segment, result.payload, result.info, number, result.margin_frames))
            stored.tallies.update(tally(segment, result))
    return stored


def _text_tokens(segments: list[Segment], tokenizer: str) -> list[int]:
    """Token ids of each text with the end-of-sequence token and without a beginning one; 0 without a tokenizer."""
    if not tokenizer:
        return [0] * len(segments)
    loaded = load_tokenizer(tokenizer)
    begins = loaded.bos_token_id not in (None, loaded.eos_token_id)
    return [len(ids) - begins for ids in tokenise([segment.text for segment in segments], loaded)]


def _store_documents(tar: TarWriter, task: ShardTask, results: Iterator[np.ndarray], options: BuildOptions) -> Stored:
    rows: list[IndexRow] = []
    stem, members = task.name.removesuffix(".tar"), itertools.count()
    segments: list[Segment] = []
    tokens: list[np.ndarray] = []
    waiting = 0
    for number, (segment, ids) in enumerate(zip(task.segments, results, strict=True), 1):
        segments.append(segment)
        tokens.append(ids)
        waiting += len(ids)
        if waiting >= options.tokens_per_member or number == len(task.segments):
            rows += add_documents(tar, f"{stem}-{next(members):04d}", segments, tokens)
            segments, tokens, waiting = [], [], 0
    return Stored(rows, [], collections.Counter())
