"""The written format: what a corpus yields, what one index row says, what a manifest holds. No torch here.

A shard set is a folder::

    manifest.json            Manifest: format version, counts, checksums, how it was built
    index.parquet            one IndexRow per sample, in shard order
    train-000000.tar ...     plain WebDataset tars (dot-free keys, mtime/uid/gid 0)

Video sample members: ``<key>.mp4`` and ``<key>.json``. Text shard members: ``<key>.npy`` (the token ids of many
documents, concatenated) and ``<key>.json`` (where each document starts); an index row then addresses one
document's byte range inside the ``.npy`` payload.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

FORMAT_VERSION = 1
Kind = Literal["video", "text", "features"]
SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]*")
"""What a split may be called: shards begin with it."""


@dataclass(frozen=True, slots=True)
class Crop:
    """A part of the picture, in fractions of its upright width and height."""

    left: float
    top: float
    right: float
    bottom: float
    square: bool = False
    """Widen the shorter side around the centre until the part is square in pixels, as far as the picture reaches."""


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A media file, or the part of it between two times."""

    path: Path
    start_seconds: float | None = None
    """Where the piece begins, seconds as a player shows them; None = at the first picture."""
    end_seconds: float | None = None
    """The first moment that is not part of it; None = the end of the video."""
    crop: Crop | None = None
    """Keep only this part of every frame; None = the whole picture."""


@dataclass(frozen=True, slots=True)
class FrameFolder:
    """A folder of still images in playing order."""

    path: Path
    pattern: str
    """Glob of the frame files inside ``path``; sorted by name they are in playing order."""
    fps: float


@dataclass(frozen=True, slots=True)
class RowsFile:
    """A file (or folder of one file per frame) of frame features or keypoints, or the part between two times."""

    path: Path
    start_seconds: float | None = None
    """Where the piece begins, in seconds from the first row; None = at the first row."""
    end_seconds: float | None = None
    """The first moment that is not part of it; None = the end."""


Media = VideoFile | FrameFolder | RowsFile


@dataclass(frozen=True, slots=True)
class Segment:
    """A timed piece of signing with its text, or a text alone; what a corpus yields."""

    corpus: str
    id: str
    """Unique within the corpus; any characters. The shard key is derived from it."""
    split: str
    text: str
    media: Media | None = None
    """None for text-only documents."""
    language: str = ""
    """Language of the text, BCP-47 (``de``)."""
    sign_language: str = ""
    """ISO 639-3 code of the sign language (``gsg``)."""
    signer: str = ""
    gloss: str = ""
    origin: str = ""
    """Where the annotation came from (``file.csv:12``); goes into every error about this segment."""
    excluded: str = ""
    """Why a published filter leaves this segment out (``caption_too_long``): counted in the report, never stored."""


class Corpus(Protocol):
    """One file per corpus implements this: finds annotations and media, does no other I/O.

    Optional attributes: ``settings`` (dict, options that change the samples; recorded in the manifest), ``published``
    (dict, samples per split according to the publication; compared in the report), ``max_skipped_fraction`` (float,
    what is usually missing: link rot), ``notes`` (strings shown under the report).
    """

    name: str

    def segments(self) -> Iterator[Segment]:
        """Every annotated segment, in the order of the source files. Raises DataError for unreadable sources."""
        ...


ANNOTATION = ("split", "corpus", "text", "language", "sign_language", "signer", "gloss")
"""What a sample's ``.json`` member says about it besides its id: fields of a Segment and of an IndexRow."""


UNLABELLED = "unlabelled"
"""Option in a manifest: samples may have no text."""
MARGIN_SECONDS, MARGIN_FRAMES = "margin_seconds", "margin_frames"
"""Kept around every clip: the option in a manifest, and its frames on each side in a sample's ``.json``. ``frames`` of
the index are those of the clip alone."""


class IndexRow(NamedTuple):
    """One sample: where its bytes lie and all that ordering, mixing, packing and scoring need."""

    shard: str
    """File name of the tar, relative to the shard set."""
    key: str
    offset: int
    """First payload byte inside the tar: of the video member, or of this document's token ids."""
    size: int
    crc32: int
    meta_offset: int
    """First byte of the ``.json`` member, -1 for text documents."""
    meta_size: int
    meta_crc32: int
    split: str
    corpus: str
    sample_id: str
    """The segment's own id, unique within ``corpus``."""
    text: str
    text_hash: int
    """``text_hash(text)``: equal texts are never each other's negatives."""
    language: str
    sign_language: str
    signer: str
    gloss: str
    frames: int
    """Frames stored (0 for text); decoding must deliver exactly this many."""
    fps: float
    duration_seconds: float
    width: int
    height: int
    tokens: int
    """Token ids of a text document (0 for video)."""


@dataclass(slots=True)
class Manifest:
    """What a shard set is made of and how; ``fingerprint`` identifies its content."""

    kind: Kind
    format_version: int = FORMAT_VERSION
    shards: list[dict[str, Any]] = field(default_factory=list)
    """Per shard: name, samples, size, sha256."""
    splits: dict[str, int] = field(default_factory=dict)
    """Samples per split."""
    counts: dict[str, int] = field(default_factory=dict)
    """Preparation report: samples, skipped, the reason counts ``skipped/<reason>``, and what is counted about the media
    (:mod:`shards.build.encoded`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options that decide the bytes: short_side, gop, crf, fps, tokenizer fingerprint, token dtype, templates."""
    versions: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    """sha256 over the shard checksums and the index content; the identity the data state refers to."""

    @property
    def margin_seconds(self) -> float:
        """Kept before and after every clip of a video set (:mod:`shards.media.margin`)."""
        return float(self.options.get(MARGIN_SECONDS, 0.0)) if self.kind == "video" else 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def text_hash(text: str) -> int:
    """63-bit hash of a text after whitespace and case folding: the identity used against false negatives."""
    folded = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(folded.encode(), digest_size=8).digest(), "big") >> 1
