"""Check a shard set completely: structure, checksums, index against members, annotations, and that every video decodes.

``verify`` in shards.index proves that no byte changed since the build; ``lint`` also proves that the bytes are good.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow.compute as pc

from shards.errors import DataError
from shards.index import INDEX_NAME, ShardSet, fingerprint, read_index
from shards.prepare import ordered_map
from shards.schema import text_hash
from shards.tar import index_tar
from shards.verify import Problem, verify_shard
from shards.video import decode as decode_video

_ANNOTATED = ("split", "corpus", "text", "language", "sign_language", "signer", "gloss")
_COMPARED = (*_ANNOTATED, "frames", "fps", "width", "height")


@dataclass(slots=True)
class LintReport:
    """What was looked at and every problem found."""

    dir: str
    shards: int = 0
    samples: int = 0
    frames: int = 0
    """Frames decoded."""
    tokens: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ok": self.ok}


@dataclass(frozen=True, slots=True)
class _ShardWork:
    path: Path
    entry: dict[str, Any]
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        return self.path.name


def lint(
    folder: Path | str, decode: bool = True, workers: int = 1, on_progress: Callable[[int, int], None] | None = None
) -> LintReport:
    """Check every shard of a set.

    Args:
        folder: holds manifest.json, index.parquet and the tars.
        decode: also decode every video and count its frames.
        workers: processes, one shard at a time each.
        on_progress: called with (samples done, samples in all).

    Raises:
        DataError: the set cannot be opened at all (no or unreadable manifest or index).
    """
    began = time.monotonic()
    shard_set = read_index(folder)
    report = LintReport(str(folder), problems=_lint_index(shard_set))
    check = functools.partial(_lint_shard, decode=decode)
    for work, (problems, frames) in ordered_map(check, _work(shard_set), workers):
        report.shards += 1
        report.samples += len(work.rows)
        report.frames += frames
        report.tokens += sum(row["tokens"] for row in work.rows)
        report.problems += problems
        if on_progress is not None:
            on_progress(report.samples, len(shard_set))
    report.seconds = time.monotonic() - began
    return report


def _work(shard_set: ShardSet) -> Iterator[tuple[_ShardWork, _ShardWork]]:
    column = shard_set.table.column("shard")
    for entry in shard_set.manifest.shards:
        rows = shard_set.table.filter(pc.equal(column, entry["name"])).to_pylist()
        work = _ShardWork(shard_set.dir / entry["name"], entry, rows)
        yield work, work


def _lint_index(shard_set: ShardSet) -> list[Problem]:
    """Rules about the index as a whole."""
    table, manifest = shard_set.table, shard_set.manifest
    problems = []
    if fingerprint(manifest.shards, table) != manifest.fingerprint:
        problems.append(Problem(INDEX_NAME, "", "fingerprint", "its values are not those the manifest was written for"))
    found = dict(collections.Counter(table.column("split").to_pylist()))
    if found != manifest.splits:
        problems.append(Problem(INDEX_NAME, "", "splits", f"{found}, the manifest says {manifest.splits}"))
    listed = {entry["name"] for entry in manifest.shards}
    for name in sorted(set(table.column("shard").unique().to_pylist()) - listed):
        problems.append(Problem(name, "", "unlisted_shard", "in the index but not in the manifest"))
    for path in sorted(shard_set.dir.glob("*.tar")):
        if path.name not in listed:
            problems.append(Problem(path.name, "", "unlisted_shard", "in the folder but not in the manifest"))
    counts = table.group_by(["corpus", "sample_id"]).aggregate([([], "count_all")])
    for row in counts.filter(pc.greater(counts.column("count_all"), 1)).to_pylist():
        detail = f"{row['sample_id']!r} of {row['corpus']} occurs {row['count_all']} times"
        problems.append(Problem(INDEX_NAME, "", "duplicate_id", detail))
    return problems


def _lint_shard(work: _ShardWork, decode: bool) -> tuple[list[Problem], int]:
    problems = verify_shard(work.path, work.entry, work.rows)
    damaged = {problem.key for problem in problems if problem.rule == "crc32"}
    if not work.path.is_file():
        return problems, 0
    problems += _lint_names(work.path)
    frames = 0
    with work.path.open("rb") as handle:
        for row in work.rows:
            problems += [Problem(row["shard"], row["key"], rule, detail) for rule, detail in _lint_row(row)]
            if row["key"] in damaged:
                continue
            found = _lint_video(handle, row, decode) if row["meta_offset"] >= 0 else []
            frames += row["frames"] if decode and not found else 0
            problems += [Problem(row["shard"], row["key"], rule, detail) for rule, detail in found]
    if work.rows and work.rows[0]["meta_offset"] < 0 and not damaged:
        problems += _lint_documents(work)
    return problems, frames


def _lint_names(path: Path) -> list[Problem]:
    """WebDataset's rules: a key per sample without dots, its members side by side."""
    try:
        names = [member.name for member in index_tar(path)]
    except DataError:
        return []  # verify_shard has reported it
    problems = []
    keys = [name.partition(".")[0] for name in names]
    starts = [key for key, before in zip(keys, [None, *keys], strict=False) if key != before]
    for key, number in collections.Counter(starts).items():
        if number > 1:
            problems.append(Problem(path.name, key, "split_sample", f"its members lie in {number} places"))
    for name, number in collections.Counter(names).items():
        if number > 1:
            problems.append(Problem(path.name, name.partition(".")[0], "duplicate_member", f"{name} x {number}"))
    return problems


def _lint_row(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not row["text"].strip():
        yield "empty_text", f"{row['sample_id']} has no text"
    if row["text_hash"] != text_hash(row["text"]):
        yield "text_hash", f"{row['sample_id']}: the hash is not that of the text"
    if row["tokens"] <= 0 and row["frames"] <= 0:
        yield "empty_sample", f"{row['sample_id']} has neither frames nor tokens"


def _lint_video(handle: BinaryIO, row: dict[str, Any], decode: bool) -> list[tuple[str, str]]:
    handle.seek(row["meta_offset"])
    try:
        meta = json.loads(handle.read(row["meta_size"]))
    except ValueError as error:
        return [("meta", f"the json member cannot be parsed ({error})")]
    found = [
        ("meta", f"{name} is {meta[name]!r} in the json member, {row[name]!r} in the index")
        for name in _COMPARED
        if name in meta and meta[name] != row[name]
    ]
    if decode:
        handle.seek(row["offset"])
        try:
            image = decode_video(handle.read(row["size"]), row["frames"], where=f"{row['shard']}:{row['key']}")
        except DataError as error:
            return [*found, ("decode", error.what)]
        if image.shape[1:3] != (row["height"], row["width"]):
            found.append(("size", f"frames are {image.shape[1:3]}, the index says {(row['height'], row['width'])}"))
    return found


def _lint_documents(work: _ShardWork) -> list[Problem]:
    """Token members: valid .npy arrays that the documents' byte ranges cover from end to end."""
    problems = []
    rows_of: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in work.rows:
        rows_of[row["key"]].append(row)
    with work.path.open("rb") as handle:
        for member in index_tar(work.path):
            key, _, kind = member.name.partition(".")
            if kind != "npy":
                continue
            handle.seek(member.offset)
            payload = handle.read(member.size)
            try:
                ids = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
            except ValueError as error:
                problems.append(Problem(work.path.name, key, "npy", f"not an array ({error})"))
                continue
            rows = rows_of.get(key, [])
            data = member.offset + member.size - ids.nbytes
            expected = np.cumsum([data, *(row["tokens"] * ids.itemsize for row in rows)]).tolist()
            if [row["offset"] for row in rows] != expected[:-1] or expected[-1] != member.offset + member.size:
                problems.append(Problem(work.path.name, key, "documents", "byte ranges do not cover the array exactly"))
    return problems
