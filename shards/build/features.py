"""Write the frame features of a video shard set as another shard set with the same shards, keys, rows and annotations.

Worker processes decode ahead; the encoder runs in this process. Finished shards are kept, so that a killed run
continues, and the set appears complete or not at all.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shards.build.prepare import Skip, ordered_map
from shards.build.work import Work, disk_errors, open_work
from shards.errors import DataError
from shards.format.index import ShardSet, fingerprint, read_index, rows_to_table
from shards.format.writer import TarWriter, dump_json
from shards.load.features import DTYPE
from shards.load.reader import wanted_frames
from shards.media.margin import margin_frames
from shards.media.square import Placement
from shards.media.video import decode
from shards.schema import ANNOTATION, IndexRow, Manifest
from shards.storage.store import open_folder

Decoded = list[np.ndarray] | DataError
"""Frames [T, H, W, 3] of every view of a clip."""


class PictureChange(Protocol):
    """How the further views of a clip are made; picklable. The view counts as the showing of its random numbers."""

    def placement(self, sample: int, showing: int) -> Placement:
        """Which square of the frames to decode."""
        ...

    def picture(self, frames_THWC: np.ndarray, sample: int, showing: int) -> np.ndarray:
        """What becomes of it."""
        ...


class FrameEncoder(Protocol):
    """Turns frames into features."""

    identity: dict[str, Any]
    """Everything that decides the features, with ``fingerprint`` and ``width``; kept in the manifest."""
    image_pixels: int

    def __call__(self, frames_THWC: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] RGB, H = W = ``image_pixels`` -> floats [T, D]."""
        ...


@dataclass(frozen=True, slots=True)
class FeatureOptions:
    """How features are extracted."""

    frame_stride: int = 1
    """Store every n-th frame; training may use fewer, never more."""
    workers: int = 1
    """Processes that decode."""
    max_skipped_fraction: float = 0.01
    """Fail if a larger part of the clips is unreadable."""
    views: int = 1
    """Views per clip: the clip as it is, and augmented ones."""

    def __post_init__(self) -> None:
        if self.views < 1:
            raise DataError(f"views {self.views} is not positive", where="features", fix="give 1 or more")
        if self.frame_stride < 1:
            raise DataError(f"frame_stride {self.frame_stride} is not positive", where="features", fix="give 1 or more")


def write_features(
    source: Path | str,
    out: Path | str,
    encoder: FrameEncoder,
    options: FeatureOptions,
    on_progress: Callable[[int, int], None] | None = None,
    change: PictureChange | None = None,
) -> Manifest:
    """Write the features of every clip of a video shard set.

    Args:
        source: folder or URL of the videos.
        out: new folder or URL; a finished set of the same source, encoder and options is returned unchanged.
        encoder: deterministic; called in this process.
        options: frames and workers.
        on_progress: called with (clips done, clips in all).
        change: makes the views after the first; what it is stands in the encoder's identity.

    Raises:
        DataError: no video shard set, too many unreadable clips, ``out`` holds something else, or a full disk.
    """
    shard_set = read_index(source)
    if shard_set.manifest.kind != "video":
        raise DataError(
            f"holds {shard_set.manifest.kind} samples", where=str(source), fix="extract features from a video shard set"
        )
    return _Extraction(shard_set, out, encoder, options, on_progress, change).run()


class _Extraction:
    def __init__(
        self,
        source: ShardSet,
        out: Path | str,
        encoder: FrameEncoder,
        options: FeatureOptions,
        on_progress: Callable[[int, int], None] | None,
        change: PictureChange | None,
    ) -> None:
        self.change = change
        self.source, self.encoder, self.options, self.on_progress = source, encoder, options, on_progress
        self.work: Work = open_work(out)
        stored = {**encoder.identity, "frame_stride": options.frame_stride, "dtype": DTYPE.str}
        if options.views > 1:
            stored["views"] = options.views
        about: dict[str, Any] = {"source": source.fingerprint, "features": stored}
        if "video" in source.manifest.options:  # translation converts other videos to this form first
            about["video"] = source.manifest.options["video"]
        self.identity: dict[str, Any] = {"options": about, "versions": source.manifest.versions}
        counts = [shard["samples"] for shard in source.manifest.shards]
        begins = np.cumsum([0, *counts]).tolist()
        names = [shard["name"] for shard in source.manifest.shards]
        self.ranges = dict(zip(names, zip(begins, counts, strict=False), strict=True))
        self.done = 0

    def run(self) -> Manifest:
        if (manifest := self.work.finished(self.identity)) is not None:
            return manifest
        with disk_errors(self.work.where), self.work.session(self.identity, None):
            if not self.work.only_rename_missing(self.identity):
                self._write_shards()
                self._finish()
            return self.work.publish()

    def _write_shards(self) -> None:
        missing = [name for name in self.ranges if self.work.read_part(name) is None]
        self.done = len(self.source) - sum(self.ranges[name][1] for name in missing)
        read = _Decode(
            str(self.source.dir), self.encoder.image_pixels, self.options.frame_stride, self.options.views,
            self.source.manifest.margin_seconds, self.change,
        )  # fmt: skip
        units = ((name, numbered) for name in missing for numbered in self._rows(name))
        with contextlib.closing(ordered_map(read, units, self.options.workers)) as decoded:
            for name in missing:
                self._write_shard(name, decoded)

    def _rows(self, shard: str) -> Iterator[tuple[int, IndexRow]]:
        """The rows of a shard, with their numbers in the set."""
        begin, count = self.ranges[shard]
        for number, values in enumerate(self.source.table.slice(begin, count).to_pylist(), begin):
            yield number, IndexRow(**values)

    def _write_shard(self, name: str, decoded: Iterator[tuple[str, Decoded]]) -> None:
        rows: list[IndexRow] = []
        skips: list[Skip] = []
        with self.work.scratch() as folder:
            with TarWriter(folder / name) as tar:
                for _, row in self._rows(name):
                    _, frames_or_error = next(decoded)
                    if isinstance(frames_or_error, DataError):
                        detail = f"{frames_or_error.where}: {frames_or_error.what}"
                        skips.append(Skip(row.sample_id, row.split, "unreadable_media", detail, f"{name}:{row.key}"))
                    else:
                        rows.append(self._add(tar, row, frames_or_error))
                    self.done += 1
                    if self.on_progress is not None:
                        self.on_progress(self.done, len(self.source))
            part = {
                "size": tar.size,
                "sha256": tar.digest.hexdigest(),
                "skips": [dataclasses.asdict(skip) for skip in skips],
                "rows": [list(row) for row in rows],
            }
            self.work.store(tar, name, rows, json.dumps(part).encode())

    def _add(self, tar: TarWriter, row: IndexRow, views: list[np.ndarray]) -> IndexRow:
        """Append one clip's features and json, and return the new index row."""
        features_KTD = np.stack([self.encoder(frames_THWC).astype(DTYPE) for frames_THWC in views])
        if not np.isfinite(features_KTD).all():
            raise DataError(
                "features beyond the range of float16, or not finite",
                where=f"{row.shard}:{row.key}",
                fix="use a backbone whose outputs are normalised, or look for broken weights",
            )
        buffer = io.BytesIO()
        array = features_KTD if len(views) > 1 else features_KTD[0]
        np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
        payload = buffer.getvalue()
        header = len(payload) - array.nbytes
        annotation = {name: getattr(row, name) for name in ANNOTATION}
        stored: dict[str, Any] = {
            "frames": array.shape[-2],
            "fps": row.fps / self.options.frame_stride,
            "duration_seconds": row.duration_seconds,
            "width": array.shape[-1],
            "height": len(views),
        }
        member = tar.add(f"{row.key}.npy", payload)
        meta = tar.add(f"{row.key}.json", dump_json({"id": row.sample_id, **annotation, **stored}))
        return row._replace(
            offset=member.offset + header, size=array.nbytes, crc32=zlib.crc32(payload[header:]),
            meta_offset=meta.offset, meta_size=meta.size, meta_crc32=meta.crc32, **stored,
        )  # fmt: skip

    def _finish(self) -> None:
        """Join the part records into skipped.jsonl, index.parquet and, last, manifest.json."""
        identity = self.identity
        manifest = Manifest("features", options=identity["options"], versions=identity["versions"])
        rows: list[IndexRow] = []
        skips: list[dict[str, Any]] = []
        for name, part in self.work.parts():
            part_rows = [IndexRow(*values) for values in part["rows"]]
            skips += part["skips"]
            if part_rows:
                sizes = {"samples": len(part_rows), "size": part["size"], "sha256": part["sha256"]}
                manifest.shards.append({"name": name, **sizes})
            rows += part_rows
        if len(skips) > self.options.max_skipped_fraction * len(self.source) or not rows:
            first = "; ".join(f"{skip['origin']}: {skip['detail']}" for skip in skips[:3])
            raise DataError(
                f"{len(skips)} of {len(self.source)} clips cannot be read. First: {first}",
                where=str(self.source.dir),
                fix="run `slt shards lint DIR` and rebuild or copy the shards",
            )
        manifest.splits = dict(sorted(collections.Counter(row.split for row in rows).items()))
        manifest.counts = {"samples": len(rows), "skipped": len(skips)}
        table = rows_to_table(rows)
        manifest.fingerprint = fingerprint(manifest.shards, table)
        lines = "".join(json.dumps(skip, ensure_ascii=False) + "\n" for skip in skips)
        self.work.finish(table, manifest, lines.encode())


@dataclass(frozen=True, slots=True)
class _Decode:
    """Decodes the views of a clip; runs in builder processes."""

    location: str
    size: int
    frame_stride: int
    views: int
    margin_seconds: float
    change: PictureChange | None

    def __call__(self, numbered: tuple[int, IndexRow]) -> Decoded:
        number, row = numbered
        where = f"{self.location}/{row.shard}:{row.key}"
        try:
            payload = open_folder(self.location).read_range(row.shard, row.offset, row.size)
            if zlib.crc32(payload) != row.crc32:
                fix = "run `slt shards lint`"
                raise DataError("the bytes do not match the CRC-32 in the index", where=where, fix=fix)
            wanted, margin = (
                wanted_frames(row.frames, 0, self.frame_stride),
                margin_frames(self.margin_seconds, row.fps),
            )
            if margin:
                wanted = [margin + place for place in (range(row.frames) if wanted is None else wanted)]
            stored = row.frames + 2 * margin
            found = [decode(payload, stored, wanted, self.size, where)]
            for view in range(1, self.views):
                assert self.change is not None  # `write_features`
                placement = self.change.placement(number, view)
                frames_THWC = decode(payload, stored, wanted, self.size, where, placement)
                found.append(self.change.picture(frames_THWC, number, view))
            return found
        except DataError as error:
            return error
