"""Work of the builder processes: one segment -> stored bytes, documents -> token ids; and their ordered pool."""

from __future__ import annotations

import collections
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import TypeVar

import numpy as np

from shards.errors import DataError
from shards.media.frame_folder import MissingFrames, is_frame
from shards.media.margin import margin_frames
from shards.media.rows import RowsForm
from shards.media.source import OutsideVideo, no_file
from shards.media.video import (
    VideoInfo,
    VideoOptions,
    probe,
    ready_or_why,
    transcode,
    transcode_pieces,
)
from shards.names import located
from shards.schema import FrameFolder, Media, RowsFile, Segment, VideoFile
from shards.text import load_tokenizer, tokenise

logger = logging.getLogger(__name__)
Tag = TypeVar("Tag")
Unit = TypeVar("Unit")
Result = TypeVar("Result")
EXCLUDED = "excluded/"
_IN_FLIGHT_PER_WORKER = 4


@dataclass(frozen=True, slots=True)
class Skip:
    """A segment that does not become a sample; written to ``skipped.jsonl``."""

    id: str
    split: str
    reason: str
    """``missing_media`` | ``unreadable_media`` | ``outside_video`` | ``missing_frames`` | ``empty_text`` |
    ``wrong_times`` | ``excluded/<why>``."""
    detail: str
    origin: str

    @property
    def excluded(self) -> bool:
        """Whether a published filter left out the segment: no fault, and not counted against the skip budget."""
        return self.reason.startswith(EXCLUDED)


@dataclass(frozen=True, slots=True)
class PreparedVideo:
    payload: bytes
    info: VideoInfo
    """Of the clip, without its margins."""
    why: str = ""
    """Why a whole file was encoded, a key of ``build.encoded.REASONS``; empty for other media and unchanged files."""
    source_bytes: int = 0
    """Size of that file."""
    margin_frames: int = 0
    """Stored before the clip, and as many after it."""


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """Frame features or keypoints of a segment."""

    rows: np.ndarray
    """float16 [T, W]."""
    rate: float
    """Rows per second."""


def has_media(media: Media) -> bool:
    """Whether the file exists, in any spelling of its name, or the folder holds at least one frame."""
    media = located(media)
    if isinstance(media, RowsFile):
        return media.path.exists()
    if isinstance(media, VideoFile):
        return media.path.is_file()
    return media.path.is_dir() and any(map(is_frame, media.path.glob(media.pattern)))


def prepare_videos(
    segments: Sequence[Segment], options: VideoOptions, margin_seconds: float = 0.0
) -> list[PreparedVideo | Skip]:
    """Transcode one segment, or several pieces of one file in order of their starts.

    Unusable media becomes a Skip with its reason. ``margin_seconds``: stored around each segment, which has times.
    """
    media = [segment.media if segment.media is None else located(segment.media) for segment in segments]
    pieces = [item for item in media if isinstance(item, VideoFile)]
    alone = len(pieces) < len(media) or (len(media) == 1 and not margin_seconds)
    if alone or not has_media(pieces[0]):
        return [prepare_video(segment, options) for segment in segments]
    results = transcode_pieces(pieces, options, margin_seconds)
    return [_prepared(segment, result, margin_seconds) for segment, result in zip(segments, results, strict=True)]


def prepare_video(segment: Segment, options: VideoOptions) -> PreparedVideo | Skip:
    """Transcode one segment; unusable media becomes a Skip with its reason."""
    assert segment.media is not None and not isinstance(segment.media, RowsFile)
    media = located(segment.media)
    if not has_media(media):
        return Skip(segment.id, segment.split, "missing_media", _absent(media), segment.origin)
    try:
        ready = ready_or_why(media, options) if isinstance(media, VideoFile) else ""
        if not isinstance(ready, str):
            return PreparedVideo(*ready)
        prepared = _prepared(segment, transcode(media, replace(options, keep_ready=False)))
        if ready and isinstance(prepared, PreparedVideo):
            return replace(prepared, why=ready, source_bytes=media.path.stat().st_size)
        return prepared
    except DataError as error:
        return _prepared(segment, error)


def _absent(media: Media) -> str:
    path = media.path
    if isinstance(media, FrameFolder) and path.is_dir():
        return f"{path} holds no image that matches {media.pattern}"
    return f"{path} {no_file(path) or 'is a file, not a folder of images'}"


def _prepared(segment: Segment, result: bytes | DataError, margin_seconds: float = 0.0) -> PreparedVideo | Skip:
    if isinstance(result, bytes):
        info = probe(result)
        margin = margin_frames(margin_seconds, info.fps)
        frames = info.frames - 2 * margin
        clip = replace(info, frames=frames, duration_seconds=frames / info.fps) if margin else info
        return PreparedVideo(result, clip, margin_frames=margin)
    reason = "missing_frames" if isinstance(result, MissingFrames) else "unreadable_media"
    reason = "outside_video" if isinstance(result, OutsideVideo) else reason
    return Skip(segment.id, segment.split, reason, f"{result.where}: {result.what}", segment.origin)


def prepare_rows(segments: Sequence[Segment], form: RowsForm) -> list[PreparedRows | Skip]:
    """Read the files of segments; unusable ones become a Skip with its reason."""
    return [_prepare_rows(segment, form) for segment in segments]


def _prepare_rows(segment: Segment, form: RowsForm) -> PreparedRows | Skip:
    assert isinstance(segment.media, RowsFile)
    media = located(segment.media)
    if not media.path.exists():
        return Skip(segment.id, segment.split, "missing_media", f"{media.path} does not exist", segment.origin)
    try:
        return PreparedRows(form.read(media), form.rate)
    except DataError as error:
        detail = f"{error.where}: {error.what}"
        return Skip(segment.id, segment.split, "unreadable_media", detail, segment.origin)


def prepare_documents(segments: Sequence[Segment], tokenizer: str) -> list[np.ndarray]:
    """Token ids of each segment's text, with the tokenizer of this folder."""
    return tokenise([segment.text for segment in segments], load_tokenizer(tokenizer)) if segments else []


def ordered_map(
    function: Callable[[Unit], Result], units: Iterator[tuple[Tag, Unit]], workers: int
) -> Generator[tuple[Tag, Result], None, None]:
    """``(tag, function(unit))`` in order, by ``workers`` processes (0 or 1: this one) that run a bounded number ahead.

    Args:
        function: picklable, like its results.
        units: the tagged work.
        workers: a process starts only when there is work for it.

    Raises:
        DataError: a process died, e.g. killed for memory; names the tag in work.
    """
    if workers <= 1:
        for tag, unit in units:
            yield tag, function(unit)
        return
    context = multiprocessing.get_context("spawn")  # a forked copy of threads and locks can hang
    pending: collections.deque[tuple[Tag, Future[Result]]] = collections.deque()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_exit_with_parent)
    in_work = ""
    try:
        for tag, unit in units:
            in_work = in_work or str(tag)
            pending.append((tag, pool.submit(function, unit)))
            if len(pending) >= workers * _IN_FLIGHT_PER_WORKER:
                done, future = pending.popleft()
                in_work = str(done)
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            in_work = str(done)
            yield done, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a builder process died (out of memory, or a crash in a media library)",
            where=f"at or shortly after {in_work}",
            fix="run again with fewer --workers; finished shards are kept",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _exit_with_parent() -> None:
    """End this builder process when its parent is gone: kill -9 gives no other notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
