"""Build a shard set from a corpus: parallel, deterministic, restartable, complete or absent.

Shards are cut by the annotations alone (every ``samples_per_shard`` segments of a split), so their bytes do not depend
on the number of processes. Work happens in ``.<out>.building`` beside the target; a finished shard leaves a part file
there, and a killed build continues after the last one. The folder gets its name in one rename at the very end.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.build_plan import BuildOptions, ShardTask, Survey, build_identity, shard_tasks, survey_corpus
from shards.errors import DataError
from shards.index import MANIFEST_NAME, fingerprint, read_manifest, rows_to_table, write_atomic, write_index
from shards.prepare import PreparedVideo, Skip, ordered_map, prepare_documents, prepare_videos
from shards.schema import Corpus, IndexRow, Manifest, Segment
from shards.writer import TarWriter, add_documents, add_video

logger = logging.getLogger(__name__)
SKIPPED_NAME = "skipped.jsonl"
_PLAN_NAME, _LOCK_NAME, _PARTS = "build.json", "lock", "parts"
_DOCUMENTS_PER_UNIT = 512


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """State of a running build, after every sample (video) or group of documents (text)."""

    done: int
    """Segments handled, including skipped ones and those of shards finished by an earlier run."""
    total: int
    skipped: int
    shard: str


def build(
    corpus: Corpus,
    out: Path,
    options: BuildOptions,
    workers: int = 1,
    on_progress: Callable[[BuildProgress], None] | None = None,
) -> Manifest:
    """Write the shard set of ``corpus`` to the folder ``out``.

    A finished ``out`` made from the same annotations and options is returned as it is; a killed build continues.

    Args:
        corpus: yields the same segments in the same order every time it is asked.
        out: new or empty folder.
        workers: processes that transcode or tokenise.
        on_progress: called in this process.

    Raises:
        DataError: unusable annotations, too many skipped segments, ``out`` holds something else, or the disk is full.
    """
    out = Path(os.path.abspath(out))
    survey = survey_corpus(corpus, options)
    identity = build_identity(corpus, options, survey)
    if (finished := _finished(out, identity)) is not None:
        return finished
    work = out.with_name(f".{out.name}.building")
    try:
        with _exclusive(work):
            if not _only_rename_missing(work, identity):
                _start(work, identity)
                _write_shards(corpus, work, options, survey, (workers, on_progress))
                _finish(work, options, survey, identity)
            shutil.rmtree(work / _PARTS, ignore_errors=True)
            for name in (_PLAN_NAME, _LOCK_NAME):
                (work / name).unlink(missing_ok=True)
            work.rename(out)
            _sync_folder(out.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                "the disk is full",
                where=str(work),
                fix="free some space and run the same command again: finished shards are kept",
            ) from error
        raise DataError(f"cannot write ({error})", where=str(out), fix="choose a folder you can write to") from error
    return read_manifest(out)


def _finished(out: Path, identity: dict[str, Any]) -> Manifest | None:
    """The manifest of an ``out`` that already holds this build; None when there is nothing yet; DataError otherwise."""
    if os.path.ismount(out):
        raise DataError("the folder is a mount point and cannot be renamed to", where=str(out), fix=f"use {out}/shards")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_NAME).is_file():
        raise DataError("not empty and not a shard set", where=str(out), fix="choose another --out")
    manifest = read_manifest(out)
    differing = sorted(
        key
        for key in manifest.options.keys() | identity["options"].keys()
        if manifest.options.get(key) != identity["options"].get(key)
    )
    if differing:
        raise DataError(
            f"holds a shard set made otherwise; different: {', '.join(differing)}",
            where=str(out),
            fix="choose another --out, or delete this folder first",
        )
    logger.info("%s is complete already: %s", out, manifest.splits)
    return manifest


@contextlib.contextmanager
def _exclusive(work: Path) -> Iterator[None]:
    """Hold the working folder for this process alone."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / _LOCK_NAME).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                "another build is writing here", where=str(work), fix="wait for it, or choose another --out"
            ) from None
        yield


def _only_rename_missing(work: Path, identity: dict[str, Any]) -> bool:
    return (work / MANIFEST_NAME).exists() and read_manifest(work).options == identity["options"]


def _start(work: Path, identity: dict[str, Any]) -> None:
    """Keep the parts of an interrupted build with the same identity, remove everything else."""
    plan = work / _PLAN_NAME
    wanted = json.dumps(identity, indent=1, sort_keys=True).encode()
    if not plan.exists() or plan.read_bytes() != wanted:
        for entry in work.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK_NAME:
                entry.unlink()
        write_atomic(plan, wanted)
    (work / _PARTS).mkdir(exist_ok=True)


def _write_shards(
    corpus: Corpus,
    work: Path,
    options: BuildOptions,
    survey: Survey,
    run: tuple[int, Callable[[BuildProgress], None] | None],
) -> None:
    """Write every shard that has no part file yet."""
    workers, on_progress = run
    progress = _Reporter(survey.total, on_progress)

    def units() -> Iterator[tuple[ShardTask, list[Segment]]]:
        size = 1 if survey.kind == "video" else _DOCUMENTS_PER_UNIT
        for task in shard_tasks(corpus, options, survey.kind):
            if (part := _read_part(work, task.name)) is not None and part["digest"] == task.digest:
                progress.add(task.name, len(task.segments) + len(task.skips), len(part["skips"]))
                continue
            for start in range(0, max(1, len(task.segments)), size):
                yield task, task.segments[start : start + size]

    prepare: Callable[[list[Segment]], list[Any]] = (
        functools.partial(prepare_videos, options=options.video)
        if survey.kind == "video"
        else functools.partial(prepare_documents, tokenizer=options.tokenizer)
    )
    store = _store_videos if survey.kind == "video" else _store_documents
    with contextlib.closing(ordered_map(prepare, units(), workers)) as prepared:
        for task, first in prepared:
            progress.add(task.name, len(task.skips), len(task.skips))
            results = progress.watch(task, first, prepared)
            with TarWriter(work / task.name) as tar:
                rows, skips = store(tar, task, results, options)
            _write_part(work, tar, rows, task, skips)


class _Reporter:
    """Counts handled segments and tells the caller."""

    def __init__(self, total: int, on_progress: Callable[[BuildProgress], None] | None) -> None:
        self.total, self.on_progress = total, on_progress
        self.done = self.skipped = 0

    def add(self, shard: str, done: int, skipped: int) -> None:
        self.done, self.skipped = self.done + done, self.skipped + skipped
        if self.on_progress is not None:
            self.on_progress(BuildProgress(self.done, self.total, self.skipped, shard))

    def watch(self, task: ShardTask, results: list[Any], more: Iterator[tuple[ShardTask, list[Any]]]) -> Iterator[Any]:
        """One result per segment of ``task``: those at hand, then as many units of ``more`` as it still needs."""
        left = len(task.segments)
        while left:
            yield from results
            self.add(task.name, len(results), sum(isinstance(result, Skip) for result in results))
            left -= len(results)
            if left:
                results = next(more)[1]


def _store_videos(
    tar: TarWriter, task: ShardTask, results: Iterator[PreparedVideo | Skip], _: BuildOptions
) -> tuple[list[IndexRow], list[Skip]]:
    rows, skips = [], []
    for segment, result in zip(task.segments, results, strict=True):
        if isinstance(result, Skip):
            skips.append(result)
        else:
            rows.append(add_video(tar, segment, result.payload, result.info))
    return rows, skips


def _store_documents(
    tar: TarWriter, task: ShardTask, results: Iterator[np.ndarray], options: BuildOptions
) -> tuple[list[IndexRow], list[Skip]]:
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
    return rows, []


def _write_part(work: Path, tar: TarWriter, rows: list[IndexRow], task: ShardTask, skips: list[Skip]) -> None:
    """Record a finished shard; from here on an interrupted build does not write it again."""
    if not rows:
        tar.path.unlink()
    _sync_folder(work)
    part = {
        "digest": task.digest,
        "size": tar.size,
        "sha256": tar.digest.hexdigest(),
        "skips": [dataclasses.asdict(skip) for skip in [*task.skips, *skips]],
        "rows": [dataclasses.astuple(row) for row in rows],
    }
    write_atomic(work / _PARTS / f"{task.name}.json", json.dumps(part).encode())


def _read_part(work: Path, name: str) -> dict[str, Any] | None:
    """A finished shard's record, when its tar is there as well."""
    path = work / _PARTS / f"{name}.json"
    if not path.exists():
        return None
    part = json.loads(path.read_bytes())
    tar = work / name
    if part["rows"] and not (tar.exists() and tar.stat().st_size == part["size"]):
        return None
    return part


def _finish(work: Path, options: BuildOptions, survey: Survey, identity: dict[str, Any]) -> None:
    """Join the parts into skipped.jsonl, index.parquet and, last, manifest.json."""
    manifest = Manifest(survey.kind, options=identity["options"], versions=identity["versions"])
    tables, skips = [], []
    splits: collections.Counter[str] = collections.Counter()
    for path in sorted((work / _PARTS).glob("*.tar.json")):
        part = json.loads(path.read_bytes())
        skips += part["skips"]
        if not part["rows"]:
            continue
        rows = [IndexRow(*values) for values in part["rows"]]
        tables.append(rows_to_table(rows))
        splits.update(row.split for row in rows)
        name = path.name.removesuffix(".json")
        manifest.shards.append({"name": name, "samples": len(rows), "size": part["size"], "sha256": part["sha256"]})
    _check_skips(work, skips, survey.total, options.max_skipped_fraction)
    reasons = collections.Counter(skip["reason"] for skip in skips)
    manifest.splits = dict(sorted(splits.items()))
    manifest.counts = {"samples": splits.total(), "skipped": len(skips)}
    manifest.counts |= {f"skipped/{reason}": number for reason, number in sorted(reasons.items())}
    lines = "".join(json.dumps(skip, ensure_ascii=False) + "\n" for skip in skips)
    write_atomic(work / SKIPPED_NAME, lines.encode())
    table = pa.concat_tables(tables)
    manifest.fingerprint = fingerprint(manifest.shards, table)
    write_index(work, table, manifest)


def _check_skips(work: Path, skips: list[dict[str, Any]], total: int, allowed: float) -> None:
    if len(skips) <= allowed * total and len(skips) < total:
        return
    for path in (work / _PARTS).glob("*.json"):  # the media may be repaired before the next run: look at it again
        if json.loads(path.read_bytes())["skips"]:
            path.unlink()
    reasons = collections.Counter(skip["reason"] for skip in skips)
    examples = "; ".join(
        f"{skip['origin'] or skip['id']}: {skip['reason']} {skip['detail']}".strip() for skip in skips[:3]
    )
    raise DataError(
        f"{len(skips)} of {total} segments cannot be used ({dict(reasons)}), allowed: {allowed:.1%}. First: {examples}",
        where=str(work),
        fix="repair the media or its root folder, or raise --max-skipped-fraction",
    )


def _sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
