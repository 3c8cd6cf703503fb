"""Rules about one shard and its samples; runs in the lint's worker processes."""

from __future__ import annotations

import collections
import functools
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.annotations import parse_annotation
from shards.format.tar import Member, index_tar
from shards.format.verify import Problem, verify_shard
from shards.inspect.lint_text import quoted, text_problems
from shards.media.margin import margin_frames
from shards.media.source import OpenVideo, decoded
from shards.schema import ANNOTATION, Kind, text_hash
from shards.storage.store import open_folder
from shards.text import load_tokenizer, tokenise
from shards.text_tokens import TextTokens

_COMPARED = (*ANNOTATION, "frames", "fps", "width", "height")
_DENSE_FROM, _DENSE_WEIGHT = "\u2e80", 3  # a Chinese character, kana or Hangul syllable says as much as three letters
_FLAT = 8  # levels of grey between the darkest and the brightest pixel of a picture that shows nothing
_SLOW_FROM_SECONDS = 10.0  # a short clip may well hold one word


@dataclass(frozen=True, slots=True)
class LintOptions:
    """What to check, and the limits of plausible lengths."""

    decode: bool = True
    """Decode every video: frame count, size, pictures that never change."""
    tokenizer: str = ""
    """Hugging Face tokenizer: a text set must hold its ids for the texts; no text should spell its control tokens."""
    min_frames: int = 4
    max_characters_per_second: float = 60.0
    """Fluent signing is translated at 10 to 25 characters per second; Chinese characters, kana, Hangul count three."""
    min_characters_per_second: float = 0.2
    """Only for clips of more than ten seconds."""

    def __post_init__(self) -> None:
        if self.min_frames < 0 or not 0 <= self.min_characters_per_second < self.max_characters_per_second:
            raise DataError(
                f"min_frames {self.min_frames}, characters per second {self.min_characters_per_second} to "
                f"{self.max_characters_per_second}: need >= 0 and an ascending range",
                where="lint options",
                fix="correct the option",
            )


@dataclass(frozen=True, slots=True)
class ShardWork:
    """One shard to check: its manifest entry and index rows."""

    location: str
    kind: Kind
    entry: dict[str, Any]
    rows: list[dict[str, Any]]
    margin_seconds: float
    """Kept around every clip."""
    unlabelled: bool
    """Samples may have no text."""
    adopted: bool
    """Made elsewhere: the index completes fields that a json lacks or writes as another type."""

    def __str__(self) -> str:
        return str(self.entry["name"])


@dataclass(slots=True)
class ShardResult:
    """The problems of one shard."""

    problems: list[Problem] = field(default_factory=list)
    frames: int = 0
    """Frames decoded."""

    def add(self, row: dict[str, Any], broken_rules: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> None:
        name = f"{row['sample_id']}: " if row["frames"] <= 0 else ""  # many documents share a key
        self.problems += [Problem(row["shard"], row["key"], rule, name + detail) for rule, detail in broken_rules]


def lint_shard(work: ShardWork, options: LintOptions) -> ShardResult:
    """Check one shard completely; a shard on an object store is downloaded to a temporary file first."""
    folder = open_folder(work.location)
    name = work.entry["name"]
    if not folder.exists(name) or folder.is_local:
        return _lint_file(folder.path(name) if folder.is_local else Path(name), work, options)
    with tempfile.TemporaryDirectory(prefix="slt-lint-") as scratch:
        local = Path(scratch) / name
        folder.download(name, local)
        return _lint_file(local, work, options)


def _lint_file(path: Path, work: ShardWork, options: LintOptions) -> ShardResult:
    result = ShardResult(verify_shard(path, work.entry, work.rows))
    for row in work.rows:
        named = row_problems(row, options)
        result.add(row, [problem for problem in named if not (work.unlabelled and problem[0] == "empty_text")])
    if not path.is_file():
        return result
    damaged = {problem.key for problem in result.problems if problem.rule == "crc32"}
    try:
        members = index_tar(path)
    except DataError:
        members = []  # verify_shard has reported it
    result.problems += _name_problems(path.name, members)
    with path.open("rb") as handle:
        if work.kind == "text":
            if not damaged:
                result.problems += _document_problems(handle, members, work.rows)
                for row, rule, detail in _token_problems(handle, work.rows, options.tokenizer):
                    result.add(row, [(rule, detail)])
            return result
        for row in work.rows:
            if row["key"] in damaged:
                continue
            broken_rules = list(_meta_problems(handle, row, work))
            if work.kind == "features":
                broken_rules += _feature_problems(handle, row)
            elif options.decode:
                video_problems = list(_video_problems(handle, row, margin_frames(work.margin_seconds, row["fps"])))
                result.frames += 0 if video_problems else row["frames"]
                broken_rules += video_problems
            result.add(row, broken_rules)
    return result


def _name_problems(shard: str, members: list[Member]) -> Iterator[Problem]:
    """WebDataset's rules: a key without dots per sample, its members next to each other."""
    names = [member.name for member in members]
    keys = [name.partition(".")[0] for name in names]
    starts = [key for key, before in zip(keys, [None, *keys], strict=False) if key != before]
    for key, number in collections.Counter(starts).items():
        if number > 1:
            yield Problem(shard, key, "split_sample", f"its members lie in {number} places")
    for name, number in collections.Counter(names).items():
        if number > 1:
            yield Problem(shard, name.partition(".")[0], "duplicate_member", f"{name} x {number}")


def row_problems(row: dict[str, Any], options: LintOptions) -> Iterator[tuple[str, str]]:
    """Problems visible in an index row alone: of the text, and of its length compared with the video's."""
    one_line = row["frames"] > 0  # a document may well have several
    controls = _controls(options.tokenizer).spelled(row["text"]) if options.tokenizer else []
    for rule, detail in text_problems(row["text"], row["language"], controls):
        if one_line or rule != "line_break":
            yield rule, detail
    if row["text_hash"] != text_hash(row["text"]):
        yield "text_hash", f"the hash is not that of {quoted(row['text'])}"
    if row["tokens"] <= 0 and row["frames"] <= 0:
        yield "empty_sample", f"{row['sample_id']} has neither frames nor tokens"
    if row["frames"] <= 0:
        return
    if row["frames"] < options.min_frames:
        yield "few_frames", f"{row['frames']} frames ({row['duration_seconds']:.2f} s) for {quoted(row['text'])}"
    characters = sum(_DENSE_WEIGHT if character >= _DENSE_FROM else 1 for character in row["text"].strip())
    rate = characters / row["duration_seconds"] if row["duration_seconds"] > 0 else 0.0
    speed = f"{rate:.2g} characters per second: {row['duration_seconds']:.1f} s for {quoted(row['text'])}"
    if rate > options.max_characters_per_second:
        yield "text_too_long", speed
    elif characters and row["duration_seconds"] > _SLOW_FROM_SECONDS and rate < options.min_characters_per_second:
        yield "text_too_short", speed


def _meta_problems(handle: BinaryIO, row: dict[str, Any], work: ShardWork) -> Iterator[tuple[str, str]]:
    if row["meta_offset"] < 0:
        return
    handle.seek(row["meta_offset"])
    payload = handle.read(row["meta_size"])
    try:
        meta = parse_annotation(payload, row["text"])
    except ValueError as error:
        yield "meta", f"the annotation member {error}"
        return
    for name in _COMPARED if work.kind == "video" else ANNOTATION:
        if name not in meta or meta[name] == row[name]:
            continue
        if not (work.adopted and (meta[name] in (None, "") or str(meta[name]) == str(row[name]))):
            yield "meta", f"{name} is {meta[name]!r} in the annotation member, {row[name]!r} in the index"


def _video_problems(handle: BinaryIO, row: dict[str, Any], margin: int) -> Iterator[tuple[str, str]]:
    """Decode all frames, but compare the pixels of only three of the clip; it has ``margin`` frames on each side."""
    handle.seek(row["offset"])
    shown = {margin + number for number in (0, row["frames"] // 2, row["frames"] - 1)}
    pictures: list[NDArray[Any]] = []
    count, sizes = 0, set()
    try:
        with OpenVideo(handle.read(row["size"]), "") as (container, stream, where):
            for frame in decoded(container, stream, where):
                sizes.add((frame.height, frame.width))
                if count in shown:
                    pictures.append(frame.to_ndarray(format="gray"))
                count += 1
    except DataError as error:
        yield "decode", error.what
        return
    if count != row["frames"] + 2 * margin:
        margins = f" and margins of {margin}" if margin else ""
        yield "decode", f"{count} frames, the index says {row['frames']}{margins}"
        return
    if sizes != {(row["height"], row["width"])}:
        yield "size", f"frames are {sorted(sizes)}, the index says {(row['height'], row['width'])}"
    if len(pictures) > 1 and len(sizes) == 1 and all(np.array_equal(pictures[0], other) for other in pictures[1:]):
        flat = int(pictures[0].max()) - int(pictures[0].min()) < _FLAT
        yield "still_video", "every picture is of one colour" if flat else "first, middle and last frame are the same"


def _feature_problems(handle: BinaryIO, row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Frozen features: float16 [frames, width], or one of them per view, no NaN and no infinity."""
    handle.seek(row["offset"])
    payload = handle.read(row["size"])
    view = 2 * row["frames"] * row["width"]
    if len(payload) not in (view, row["height"] * view):  # a clip with views has their number for a height
        yield "features", f"{len(payload)} bytes are not {row['frames']} rows of {row['width']} float16"
    elif not np.isfinite(np.frombuffer(payload, "<f2")).all():
        yield "features", "NaN or infinite values"


def _document_problems(handle: BinaryIO, members: list[Member], rows: list[dict[str, Any]]) -> Iterator[Problem]:
    """Token members: valid .npy arrays that the documents' byte ranges cover from end to end."""
    rows_of: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in rows:
        rows_of[row["key"]].append(row)
    shard = rows[0]["shard"] if rows else ""
    for member in members:
        key, _, kind = member.name.partition(".")
        if kind != "npy":
            continue
        handle.seek(member.offset)
        try:
            ids = np.lib.format.read_array(io.BytesIO(handle.read(member.size)), allow_pickle=False)
        except ValueError as error:
            yield Problem(shard, key, "npy", f"not an array ({error})")
            continue
        documents = rows_of.get(key, [])
        data = member.offset + member.size - ids.nbytes
        expected = np.cumsum([data, *(row["tokens"] * ids.itemsize for row in documents)]).tolist()
        if [row["offset"] for row in documents] != expected[:-1] or expected[-1] != member.offset + member.size:
            yield Problem(shard, key, "documents", "byte ranges do not cover the array exactly")


@functools.lru_cache(maxsize=2)
def _vocabulary_size(tokenizer: str) -> int:
    return len(load_tokenizer(tokenizer))


@functools.lru_cache(maxsize=2)
def _controls(tokenizer: str) -> TextTokens:
    return TextTokens(load_tokenizer(tokenizer))


def _token_problems(
    handle: BinaryIO, rows: list[dict[str, Any]], tokenizer: str
) -> Iterator[tuple[dict[str, Any], str, str]]:
    """(row, rule, detail) of documents whose ids differ from this tokenizer's ids for the text."""
    if not tokenizer or not rows:
        return
    known = _vocabulary_size(tokenizer)
    expected = tokenise([row["text"] for row in rows], load_tokenizer(tokenizer))
    for row, expected_ids in zip(rows, expected, strict=True):
        ids = stored_ids(handle, row)
        if ids is None:
            continue  # reported as `documents`
        if len(ids) and int(ids.max()) >= known:
            yield row, "token_range", f"token id {int(ids.max())}, the tokenizer knows 0..{known - 1}"
        elif not np.array_equal(ids, expected_ids):
            yield row, "tokens", f"{len(ids)} ids that are not the {len(expected_ids)} of {quoted(row['text'])}"


def stored_ids(handle: BinaryIO, row: dict[str, Any]) -> NDArray[Any] | None:
    """Token ids [tokens] of a text document; None if its byte range cannot hold that many."""
    width = row["size"] // max(1, row["tokens"])
    if width not in (2, 4) or row["tokens"] * width != row["size"]:
        return None
    handle.seek(row["offset"])
    payload = handle.read(row["size"])
    return np.frombuffer(payload, f"<u{width}") if len(payload) == row["size"] else None
