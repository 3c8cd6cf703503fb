"""Planning a build from the annotations alone: options, count, digests, and which segments go into which shard."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import av

from shards.build.prepare import EXCLUDED, Skip
from shards.errors import DataError, OptionError
from shards.media.margin import check_margin
from shards.media.rows import RowsForm
from shards.media.video import VideoOptions
from shards.names import located, same_name
from shards.schema import (
    MARGIN_SECONDS,
    SPLIT_NAME,
    UNLABELLED,
    Corpus,
    Crop,
    Kind,
    Media,
    RowsFile,
    Segment,
    VideoFile,
)
from shards.text import load_tokenizer, token_dtype, tokenizer_fingerprint
from shards.text_tokens import TextTokens

DEFAULT_SKIPPED_FRACTION = 0.05
MOST_MARGIN_SECONDS = 30.0
_SEGMENTS_PER_UNIT, _OVERLAP_SECONDS, _DOCUMENTS_PER_UNIT = 8, 1.0, 512


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How samples are stored. All fields but ``max_skipped_fraction`` decide bytes."""

    video: VideoOptions = field(default_factory=VideoOptions)
    rows: RowsForm | None = None
    """How files of frame features or keypoints are read; required where a corpus names such files (`Placed`)."""
    tokenizer: str = ""
    """Hugging Face tokenizer folder; required for text corpora. With video, it counts the tokens of the texts."""
    samples_per_shard: int = 256
    """Video segments per tar; about 40 MB at 256 pixels."""
    documents_per_shard: int = 65536
    tokens_per_member: int = 1_000_000
    """Documents are concatenated into members of about this many token ids."""
    margin_seconds: float = 0.0
    """Kept before and after every segment, for ``data.jitter``; the clip itself is the same."""
    unlabelled: bool = False
    """Segments without a text are stored, too, for pseudo-labels."""
    max_skipped_fraction: float | None = None
    """A build that skips a larger part of the segments fails. None = the corpus's usual value, or 0.05. Segments
    excluded by a published filter do not count."""

    def allowed_skips(self, corpus: Corpus) -> float:
        """The fraction of segments of ``corpus`` that may be skipped."""
        if self.max_skipped_fraction is not None:
            return self.max_skipped_fraction
        return float(getattr(corpus, "max_skipped_fraction", None) or DEFAULT_SKIPPED_FRACTION)

    def __post_init__(self) -> None:
        if min(self.samples_per_shard, self.documents_per_shard, self.tokens_per_member) < 1:
            raise OptionError("shard and member sizes must be >= 1", where="build options", fix="correct the option")
        if not 0 <= self.margin_seconds <= MOST_MARGIN_SECONDS:
            what = f"margin_seconds {self.margin_seconds:g} is not between 0 and {MOST_MARGIN_SECONDS:g}"
            raise OptionError(what, where="build options", fix="correct the option")


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One tar to write: its name, its segments in order, and the digest of everything annotated about them."""

    name: str
    number: int
    """Number among all shards of the build, in the order they fill up."""
    segments: list[Segment]
    skips: list[Skip]
    """Segments skipped by their annotation alone: excluded by a published filter, without text, or wrong times."""
    digest: str

    def __str__(self) -> str:
        return self.name


@dataclass(slots=True)
class Survey:
    """Result of the first pass over the annotations, before any media is read."""

    kind: Kind = "video"
    total: int = 0
    """Segments to build, without those a published filter excludes."""
    excluded: int = 0
    digest: str = ""
    shards: int = 0
    corpora: list[str] = field(default_factory=list)


def survey_corpus(corpus: Corpus, options: BuildOptions) -> Survey:
    """Read all annotations once: kind, count and digest. Raises DataError for duplicate ids or mixed kinds."""
    survey, seen = Survey(), set()
    digest = hashlib.sha256()
    names: dict[str, None] = {}
    kinds: dict[Kind, str] = {}
    for segment in corpus.segments():
        if not SPLIT_NAME.fullmatch(segment.split):
            raise DataError(
                f"{segment.split!r} is no name of a split",
                where=segment.origin,
                fix="use small letters, digits and _, for example train, dev, test or test_aligned",
            )
        if segment.excluded:
            survey.excluded += 1
        else:
            survey.total += 1
            if options.margin_seconds:
                check_margin(segment)
            kinds.setdefault(_kind_of(segment.media), segment.origin)
        identity = segment_identity(segment)
        if identity in seen:
            first = next(other.origin for other in corpus.segments() if segment_identity(other) == identity)
            raise DataError(
                f"the id {segment.id!r} occurs twice, first at {first}",
                where=segment.origin,
                fix="make ids unique, or remove one of the two rows",
            )
        seen.add(identity)
        names[segment.corpus] = None
        digest.update(_segment_digest(segment))
    if len(kinds) != 1:
        raise DataError(
            nothing_to_build(survey.excluded) if not kinds else f"{' and '.join(kinds)} segments are mixed ({kinds})",
            where=corpus.name,
            fix="check the corpus options" if not kinds else "build two shard sets",
        )
    survey.kind, survey.digest, survey.corpora = next(iter(kinds)), digest.hexdigest(), list(names)
    if survey.kind == "text" and not options.tokenizer:
        raise OptionError("a text corpus needs a tokenizer", where=corpus.name, fix="add --tokenizer FOLDER")
    return survey


def _kind_of(media: Media | None) -> Kind:
    return "text" if media is None else "features" if isinstance(media, RowsFile) else "video"


def nothing_to_build(excluded: int) -> str:
    """Why there is nothing to build."""
    return f"all {excluded} segments are excluded" if excluded else "no segments at all"


def segment_identity(segment: Segment) -> bytes:
    """8 bytes that identify a segment's corpus and id, in any spelling of the id."""
    return hashlib.blake2b(f"{segment.corpus}\0{same_name(segment.id)}".encode(), digest_size=8).digest()


def shard_tasks(corpus: Corpus, options: BuildOptions, kind: Kind) -> Iterator[ShardTask]:
    """The shards of a build in the order they fill up: a pure function of annotations and options."""
    size = options.documents_per_shard if kind == "text" else options.samples_per_shard
    waiting: dict[str, list[Segment]] = {}
    filled: collections.Counter[str] = collections.Counter()
    numbers: collections.Counter[str] = collections.Counter()

    def task(split: str) -> ShardTask:
        segments = waiting.pop(split)
        del filled[split]
        digest = hashlib.sha256(b"".join(_segment_digest(segment) for segment in segments)).hexdigest()
        name, number = f"{split}-{numbers[split]:06d}.tar", numbers.total()
        numbers[split] += 1
        judged = [(segment, *skip_reason(segment, options.unlabelled)) for segment in segments]
        skips = [Skip(s.id, s.split, reason, detail, s.origin) for s, reason, detail in judged if reason]
        return ShardTask(
            name, number, [_located(segment) for segment, reason, _ in judged if not reason], skips, digest
        )

    for segment in corpus.segments():
        waiting.setdefault(segment.split, []).append(segment)
        filled[segment.split] += not segment.excluded  # excluded segments do not fill a shard
        if filled[segment.split] == size:
            yield task(segment.split)
    for split in list(waiting):
        yield task(split)


def _located(segment: Segment) -> Segment:
    """The segment with the spelling of its media on the disk."""
    return segment if segment.media is None else dataclasses.replace(segment, media=located(segment.media))


def skip_reason(segment: Segment, unlabelled: bool = False) -> tuple[str, str]:
    """(reason, detail) why a segment is skipped by its annotation alone; empty if it is not."""
    if segment.excluded:
        return f"{EXCLUDED}{segment.excluded}", ""
    if not segment.text.strip() and not unlabelled:
        return "empty_text", ""
    wrong = wrong_times(segment)
    return ("wrong_times", wrong) if wrong else ("", "")


def wrong_times(segment: Segment) -> str:
    """What is wrong with the annotated times of a segment; empty if they are right."""
    if not isinstance(segment.media, VideoFile | RowsFile) or segment.media.end_seconds is None:
        return ""
    start, end = segment.media.start_seconds or 0.0, segment.media.end_seconds
    if end > start:
        return ""
    return (
        f"the end {end:g} s lies before the start {start:g} s" if end < start else f"start and end are both {end:g} s"
    )


def work_units(task: ShardTask, kind: Kind) -> Iterator[list[Segment]]:
    """The segments of a shard in order, in groups that one process handles at once.

    Consecutive pieces of one video stay together, because they share the decoding between key frames.
    """
    if kind == "text":
        for start in range(0, len(task.segments), _DOCUMENTS_PER_UNIT):
            yield task.segments[start : start + _DOCUMENTS_PER_UNIT]
        return
    unit: list[Segment] = []
    for segment in task.segments:
        if unit and not (len(unit) < _SEGMENTS_PER_UNIT and _shares_decoding(unit[-1].media, segment.media)):
            yield unit
            unit = []
        unit.append(segment)
    if unit:
        yield unit


def _shares_decoding(first: Media | None, second: Media | None) -> bool:
    """Whether the second piece begins after the first one begins, and at most a little before it ends."""
    if not (isinstance(first, VideoFile) and isinstance(second, VideoFile) and first.path == second.path):
        return False
    if first.start_seconds is None or first.end_seconds is None or second.start_seconds is None:
        return False
    return second.start_seconds >= max(first.start_seconds, first.end_seconds - _OVERLAP_SECONDS)


def _segment_digest(segment: Segment) -> bytes:
    """Digest of the annotation; media by file name, so that a corpus may move to another disk."""
    values = [getattr(segment, name) for name in ("corpus", "id", "split", "text", "gloss", "signer")]
    values += [segment.language, segment.sign_language, segment.excluded]
    if segment.media is not None:
        rest = [_plain(getattr(segment.media, key)) for key in sorted(type(segment.media).__slots__) if key != "path"]
        values += [type(segment.media).__name__, same_name(segment.media.path.name), *rest]
    return hashlib.sha256(json.dumps(values).encode()).digest()


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, Crop) else value


def build_identity(corpus: Corpus, options: BuildOptions, survey: Survey) -> dict[str, Any]:
    """Everything that decides the bytes: kept in the manifest and compared before anything is reused."""
    stored: dict[str, Any] = {"corpora": survey.corpora, "segments": survey.digest, **getattr(corpus, "settings", {})}
    versions: dict[str, str] = {}
    if survey.kind != "text":
        stored["samples_per_shard"] = options.samples_per_shard
        stored |= {UNLABELLED: True} if options.unlabelled else {}
        if survey.kind == "features":
            assert options.rows is not None  # `Placed` and its form come together
            stored["features"] = options.rows.record()
        else:
            stored["video"] = options.video.record()
            stored |= {MARGIN_SECONDS: options.margin_seconds} if options.margin_seconds else {}
            versions |= {"av": av.__version__, "libavcodec": ".".join(map(str, av.library_versions["libavcodec"]))}
        if options.tokenizer:
            stored |= {"text_tokenizer": tokenizer_fingerprint(load_tokenizer(options.tokenizer))}
            versions |= {"tokenizers": version("tokenizers")}
    else:
        tokenizer = load_tokenizer(options.tokenizer)
        _check_templates(stored.get("templates", []), tokenizer)
        stored |= {name: getattr(options, name) for name in ("documents_per_shard", "tokens_per_member")}
        stored |= {"tokenizer": tokenizer_fingerprint(tokenizer), "token_dtype": token_dtype(tokenizer).str}
        versions |= {"tokenizers": version("tokenizers")}
    return {"options": stored, "versions": versions}


def _check_templates(templates: Sequence[str], tokenizer: Any) -> None:
    """Refuse templates with control tokens: a document is plain data, so they would not work as control tokens."""
    reader = TextTokens(tokenizer)
    for template in templates:
        written = "".join(literal for literal, _, _, _ in string.Formatter().parse(template))
        if spelled := reader.spelled(written):
            raise OptionError(
                f"{template!r} spells the control token {spelled[0]!r}, but documents are tokenised as plain text",
                where="templates",
                fix="use words, and the same words in connector.prompt",
            )
