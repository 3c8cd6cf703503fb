"""Build a shard set from a corpus: parallel, deterministic, restartable, complete or absent.

Shards are cut by the annotations alone (every ``samples_per_shard`` segments of a split), so their bytes do not depend
on the number of processes, the engine or the parts of an array job. A finished shard leaves a part record in the work
place (``build_work``), and a killed build continues after the last one. Index and manifest come at the very end.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from shards.build.engines import ENGINES, ShardToWrite
from shards.build.layout import BuildOptions, ShardTask, Survey, build_identity, shard_tasks, survey_corpus
from shards.build.prepare import EXCLUDED, PreparedRows, PreparedVideo, Skip
from shards.build.shard import Finished
from shards.build.work import SKIPPED_NAME, Part, Sources, Work, disk_errors, open_work
from shards.errors import DataError, OptionError
from shards.format.index import fingerprint, rows_to_table
from shards.schema import Corpus, IndexRow, Manifest
from shards.wording import first_few, listed

__all__ = ["SKIPPED_NAME", "BuildOptions", "BuildProgress", "BuildRun", "Part", "build", "build_part", "merge"]
logger = logging.getLogger(__name__)
_MIN_FAULTS = 20  # a failing build continues until it has seen this many, so that its report shows the pattern


_REPAIRS = {
    "missing_media": "fetch the missing media or correct the folder they are looked for in",
    "unreadable_media": "fetch or convert the unreadable media again",
    "outside_video": "correct the times that lie outside their videos, or fetch the videos they belong to",
    "missing_frames": "complete the frame folders",
    "empty_text": "fill the empty texts or remove their rows",
    "wrong_times": "correct the times in the annotations",
}


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """State of a running build, after every few samples (local) or every shard (Ray)."""

    done: int
    """Segments handled, including skipped ones and those of earlier runs."""
    total: int
    skipped: int
    shard: str
    before: int = 0
    """Segments of ``done`` that an earlier run handled."""
    bytes: int = 0
    """Stored by this run."""
    seconds: float = 0.0
    """Duration of the videos stored by this run."""


@dataclass(frozen=True, slots=True)
class BuildRun:
    """Where a build runs; nothing here changes a byte of the result."""

    workers: int = 1
    """Processes that transcode or tokenise; for Ray the running tasks, 0 = the cores of the cluster."""
    engine: Literal["local", "ray"] = "local"
    scratch: Path | None = None
    """Local folder for shards before their upload to an object store; None = the system's temporary folder."""
    storage_options: Mapping[str, object] | None = None
    """fsspec options of the object store; None = its configuration files."""

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise OptionError(f"unknown engine {self.engine!r}", where="--engine", fix=f"use {' or '.join(ENGINES)}")


Report = Callable[[BuildProgress], None] | None


def build(
    corpus: Corpus,
    out: Path | str,
    options: BuildOptions,
    workers: int | BuildRun = 1,
    on_progress: Report = None,
) -> Manifest:
    """Write the shard set of ``corpus`` to the folder or object store prefix ``out``.

    A finished ``out`` with the same annotations and options is returned unchanged. A killed build continues, also one
    whose parts were built elsewhere.

    Args:
        corpus: must yield the same segments in the same order each time.
        out: new or empty folder, or a URL (``s3://bucket/prefix``).
        workers: processes that transcode or tokenise, or all settings of the run.
        on_progress: called in this process.

    Raises:
        DataError: unusable annotations, too many skipped segments, ``out`` holds something else, or the disk is full.
    """
    return _Build(corpus, out, options, _as_run(workers)).everything(on_progress)


def build_part(
    corpus: Corpus, out: Path | str, options: BuildOptions, part: Part, run: BuildRun, on_progress: Report = None
) -> int | None:
    """Write one share of the shards into the work place of ``out``; other processes or machines write the rest.

    Returns:
        The number of shards in this share; ``merge`` or ``build`` finishes the set. None: the set is finished already.

    Raises:
        DataError: as for :func:`build`; another process builds the same share, or the set with other options.
    """
    return _Build(corpus, out, options, run).share(part, on_progress)


def merge(corpus: Corpus, out: Path | str, options: BuildOptions, run: BuildRun) -> Manifest:
    """Finish a shard set whose parts are all built. Raises DataError naming the parts and shards that are missing."""
    return _Build(corpus, out, options, run).merge()


def _as_run(workers: int | BuildRun) -> BuildRun:
    return workers if isinstance(workers, BuildRun) else BuildRun(workers)


class _Build:
    """One build, with the survey of its corpus and its work place."""

    def __init__(self, corpus: Corpus, out: Path | str, options: BuildOptions, run: BuildRun) -> None:
        self.corpus, self.options, self.run = corpus, options, run
        self.work: Work = open_work(out, run.scratch, run.storage_options)
        self.survey: Survey = survey_corpus(corpus, options)
        self.identity = build_identity(corpus, options, self.survey)
        self.allowed = options.allowed_skips(corpus)

    def everything(self, on_progress: Report) -> Manifest:
        if (manifest := self._complete()) is not None:
            return manifest
        with disk_errors(self.work.where), self.work.session(self.identity, None):
            if not self.work.only_rename_missing(self.identity):
                self._write_shards(None, on_progress)
                self._finish()
            return self.work.publish()

    def share(self, part: Part, on_progress: Report) -> int | None:
        if self._complete() is not None:
            return None
        with disk_errors(self.work.where), self.work.session(self.identity, part):
            return self._write_shards(part, on_progress)

    def merge(self) -> Manifest:
        if (manifest := self._complete()) is not None:
            return manifest
        with disk_errors(self.work.where), self.work.session(self.identity, None):
            if not self.work.only_rename_missing(self.identity):
                self._check_parts()
                self._finish()
            return self.work.publish()

    def _complete(self) -> Manifest | None:
        manifest = self.work.finished(self.identity)
        if manifest is not None:
            logger.info("%s is complete already: %s", self.work.target, listed(manifest.splits))
        return manifest

    def _write_shards(self, part: Part | None, on_progress: Report) -> int:
        """Write every shard of the share that has no valid record yet; returns how many shards the share has."""
        counter = _Counter(self, on_progress)
        if part is not None:
            counter.total = sum(_handled_segments(task) for task in self._tasks(part))
        todo = self._unfinished(part, counter)
        ENGINES[self.run.engine](self.work, todo, self.options, self.survey.kind, (self.run.workers, counter))
        return counter.shards

    def _tasks(self, part: Part | None = None) -> Iterator[ShardTask]:
        """The shards of a share, or all; reads the annotations again instead of keeping all segments in memory."""
        tasks = shard_tasks(self.corpus, self.options, self.survey.kind)
        return (task for task in tasks if part is None or part.has(task))

    def _unfinished(self, part: Part | None, counter: _Counter) -> Iterator[ShardToWrite]:
        states = Sources()
        for task in self._tasks(part):
            counter.shards += 1
            sources = states.digest(task)
            record = self.work.read_part(task.name)
            if record is None or (record["digest"], record["sources"]) != (task.digest, sources):
                yield ShardToWrite(task, sources)
                continue
            skips = [skip for values in record["skips"] if not (skip := Skip(**values)).excluded]
            counter.resumed(Finished(task.name, _handled_segments(task), skips, 0, 0.0))

    def _check_parts(self) -> None:
        """Raise DataError if a shard is missing."""
        missing = [task for task in self._tasks() if _unusable(self.work.read_part(task.name), task)]
        if not missing:
            return
        names = first_few([task.name for task in missing], 5)
        shares = self.work.shares()
        parts = (
            sorted({f"{task.number % of + 1}/{of}" for of in shares for task in missing}) if len(shares) == 1 else []
        )
        by_parts = f"; part {', '.join(parts)}" if parts else ""
        raise DataError(
            f"{len(missing)} shards are missing ({names}){by_parts}",
            where=self.work.target,
            fix="run the missing parts again, or run without --merge to build the rest here",
        )

    def _finish(self) -> None:
        """Join the part records into skipped.jsonl, index.parquet and, last, manifest.json."""
        manifest = Manifest(self.survey.kind, options=self.identity["options"], versions=self.identity["versions"])
        tables, skips = [], []
        splits: collections.Counter[str] = collections.Counter()
        tallies: collections.Counter[str] = collections.Counter()
        for name, part in self.work.parts():
            skips += [Skip(**values) for values in part["skips"]]
            tallies.update(part.get("tallies", {}))  # records of an older version have none
            if not part["rows"]:
                continue
            rows = [IndexRow(*values) for values in part["rows"]]
            tables.append(rows_to_table(rows))
            splits.update(row.split for row in rows)
            manifest.shards.append({"name": name, "samples": len(rows), "size": part["size"], "sha256": part["sha256"]})
        faults = [skip for skip in skips if not skip.excluded]
        if self.over_budget(len(faults)) or not tables:
            raise self.budget_error(faults)
        manifest.splits = dict(sorted(splits.items()))
        manifest.counts = _counts(splits.total(), skips) | dict(sorted(tallies.items()))
        table = pa.concat_tables(tables)
        manifest.fingerprint = fingerprint(manifest.shards, table)
        self.work.finish(table, manifest, _lines(skips))

    def over_budget(self, skipped: int) -> bool:
        """Whether this many faults fail the build, even if all later segments are usable."""
        return skipped > self.allowed * self.survey.total

    def budget_error(self, faults: list[Skip]) -> DataError:
        reasons = dict(collections.Counter(skip.reason for skip in faults).most_common())
        examples = "; ".join(f"{skip.origin or skip.id}: {skip.reason} {skip.detail}".strip() for skip in faults[:3])
        return DataError(
            f"{len(faults)} of {self.survey.total} segments cannot be used ({listed(reasons)}), "
            f"allowed: {self.allowed:.1%}. First: {examples}. All: {self.work.list_skipped(_lines(faults))}",
            where=f"{self.corpus.name}, build of {self.work.target}",
            fix="; ".join(_REPAIRS.get(reason, f"repair {reason}") for reason in reasons)
            + "; or raise --max-skipped-fraction",
        )


class _Counter:
    """Counts handled segments, reports progress, and stops a build that has skipped too many."""

    def __init__(self, owner: _Build, on_progress: Report) -> None:
        self.owner, self.on_progress = owner, on_progress
        self.total = owner.survey.total
        self.shards = self.done = self.before = self.bytes = 0
        self.seconds = 0.0
        self.faults: list[Skip] = []

    def resumed(self, shard: Finished) -> None:
        self.before += shard.segments
        self._add(shard)

    def samples(self, shard: str, results: list[Any]) -> None:
        skips = [result for result in results if isinstance(result, Skip)]
        videos = [result for result in results if isinstance(result, PreparedVideo)]
        arrays = [result for result in results if isinstance(result, PreparedRows)]
        size = sum(len(video.payload) for video in videos) + sum(array.rows.nbytes for array in arrays)
        seconds = sum(video.info.duration_seconds for video in videos)
        seconds += sum(len(array.rows) / array.rate for array in arrays)
        self._add(Finished(shard, len(results), skips, size, seconds))

    def shard(self, done: Finished) -> None:
        self._add(done)

    def _add(self, shard: Finished) -> None:
        self.done += shard.segments
        self.bytes, self.seconds = self.bytes + shard.bytes, self.seconds + shard.seconds
        self.faults += shard.skips
        if self.on_progress is not None:
            counts = (self.done, self.total, len(self.faults), shard.shard)
            self.on_progress(BuildProgress(*counts, self.before, self.bytes, self.seconds))
        if len(self.faults) >= _MIN_FAULTS and self.owner.over_budget(len(self.faults)):
            raise self.owner.budget_error(self.faults)


def _lines(skips: list[Skip]) -> bytes:
    return "".join(json.dumps(dataclasses.asdict(skip), ensure_ascii=False) + "\n" for skip in skips).encode()


def _handled_segments(task: ShardTask) -> int:
    return len(task.segments) + sum(not skip.excluded for skip in task.skips)


def _unusable(part: dict[str, Any] | None, task: ShardTask) -> bool:
    return part is None or part["digest"] != task.digest


def _counts(samples: int, skips: list[Skip]) -> dict[str, int]:
    """samples, skipped, ``skipped/<reason>`` and ``excluded/<reason>``."""
    reasons = collections.Counter(skip.reason for skip in skips)
    skipped = {f"skipped/{name}": n for name, n in sorted(reasons.items()) if not name.startswith(EXCLUDED)}
    excluded = {name: n for name, n in sorted(reasons.items()) if name.startswith(EXCLUDED)}
    return {"samples": samples, "skipped": sum(skipped.values()), **skipped, **excluded}
