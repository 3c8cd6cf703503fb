"""Planning a build from the annotations alone: options, count, digests, and which segments go into which shard."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import av

from shards.errors import DataError
from shards.prepare import Skip
from shards.schema import Corpus, Kind, Segment
from shards.text import load_tokenizer, token_dtype, tokenizer_fingerprint
from shards.video import VideoOptions


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How samples are stored. All fields but ``max_skipped_fraction`` decide bytes."""

    video: VideoOptions = field(default_factory=VideoOptions)
    tokenizer: str = ""
    """Hugging Face tokenizer folder; required for text corpora."""
    samples_per_shard: int = 256
    """Video segments per tar; about 40 MB at 256 pixels."""
    documents_per_shard: int = 65536
    tokens_per_member: int = 1_000_000
    """Documents are concatenated into members of about this many token ids."""
    max_skipped_fraction: float = 0.05
    """A build that leaves out more than this part of the segments fails."""

    def __post_init__(self) -> None:
        if min(self.samples_per_shard, self.documents_per_shard, self.tokens_per_member) < 1:
            raise DataError("shard and member sizes must be >= 1", where="build options", fix="correct the option")


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One tar to write: its name, its segments in order, and the digest of everything annotated about them."""

    name: str
    segments: list[Segment]
    skips: list[Skip]
    digest: str

    def __str__(self) -> str:
        return self.name


@dataclass(slots=True)
class Survey:
    """First pass over the annotations: what there is, before any media is read."""

    kind: Kind = "video"
    total: int = 0
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
        survey.total += 1
        kinds.setdefault("text" if segment.media is None else "video", segment.origin)
        identity = hashlib.blake2b(f"{segment.corpus}\0{segment.id}".encode(), digest_size=8).digest()
        if identity in seen:
            first = next(
                other.origin for other in corpus.segments() if (other.corpus, other.id) == (segment.corpus, segment.id)
            )
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
            "no segments at all" if not kinds else f"video and text segments are mixed ({kinds})",
            where=corpus.name,
            fix="check the corpus options" if not kinds else "build two shard sets",
        )
    survey.kind, survey.digest, survey.corpora = next(iter(kinds)), digest.hexdigest(), list(names)
    if survey.kind == "text" and not options.tokenizer:
        raise DataError("a text corpus needs a tokenizer", where=corpus.name, fix="add --tokenizer FOLDER")
    return survey


def shard_tasks(corpus: Corpus, options: BuildOptions, kind: Kind) -> Iterator[ShardTask]:
    """The shards of a build in the order they fill up: a pure function of annotations and options."""
    size = options.samples_per_shard if kind == "video" else options.documents_per_shard
    waiting: dict[str, list[Segment]] = {}
    numbers: collections.Counter[str] = collections.Counter()

    def task(split: str) -> ShardTask:
        segments = waiting.pop(split)
        digest = hashlib.sha256(b"".join(_segment_digest(segment) for segment in segments)).hexdigest()
        name = f"{split}-{numbers[split]:06d}.tar"
        numbers[split] += 1
        skips = [Skip(s.id, s.split, "empty_text", "", s.origin) for s in segments if not s.text.strip()]
        return ShardTask(name, [segment for segment in segments if segment.text.strip()], skips, digest)

    for segment in corpus.segments():
        waiting.setdefault(segment.split, []).append(segment)
        if len(waiting[segment.split]) == size:
            yield task(segment.split)
    for split in list(waiting):
        yield task(split)


def _segment_digest(segment: Segment) -> bytes:
    """Digest of what is annotated; media by file name, so that a corpus may move to another disk."""
    values = [getattr(segment, name) for name in ("corpus", "id", "split", "text", "gloss", "signer")]
    values += [segment.language, segment.sign_language]
    if segment.media is not None:
        media = dataclasses.asdict(segment.media)
        rest = [media[key] for key in sorted(media) if key != "path"]
        values += [type(segment.media).__name__, segment.media.path.name, *rest]
    return hashlib.sha256(json.dumps(values).encode()).digest()


def build_identity(corpus: Corpus, options: BuildOptions, survey: Survey) -> dict[str, Any]:
    """What decides the bytes: kept in the manifest and compared before anything is reused."""
    stored: dict[str, Any] = {"corpora": survey.corpora, "segments": survey.digest, **getattr(corpus, "settings", {})}
    versions: dict[str, str] = {}
    if survey.kind == "video":
        stored |= {"samples_per_shard": options.samples_per_shard, "video": dataclasses.asdict(options.video)}
        versions |= {"av": av.__version__, "libavcodec": ".".join(map(str, av.library_versions["libavcodec"]))}
    else:
        tokenizer = load_tokenizer(options.tokenizer)
        stored |= {name: getattr(options, name) for name in ("documents_per_shard", "tokens_per_member")}
        stored |= {"tokenizer": tokenizer_fingerprint(tokenizer), "token_dtype": token_dtype(tokenizer).str}
        versions |= {"tokenizers": version("tokenizers")}
    return {"options": stored, "versions": versions}
