"""What builder processes do: one segment -> stored bytes, many documents -> token ids; and the ordered process pool."""

from __future__ import annotations

import collections
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TypeVar

import numpy as np

from shards.errors import DataError
from shards.media import IMAGE_SUFFIXES
from shards.schema import FrameFolder, Segment, VideoFile
from shards.text import load_tokenizer, tokenise
from shards.video import VideoInfo, VideoOptions, probe, transcode

logger = logging.getLogger(__name__)
Tag = TypeVar("Tag")
Unit = TypeVar("Unit")
Result = TypeVar("Result")
_IN_FLIGHT_PER_WORKER = 4


@dataclass(frozen=True, slots=True)
class Skip:
    """A segment that does not become a sample; written to ``skipped.jsonl``."""

    id: str
    split: str
    reason: str
    """``missing_media`` | ``unreadable_media`` | ``empty_text``."""
    detail: str
    origin: str


@dataclass(frozen=True, slots=True)
class PreparedVideo:
    payload: bytes
    info: VideoInfo


def has_media(media: VideoFile | FrameFolder) -> bool:
    """Whether the file exists, or the folder holds at least one frame."""
    if isinstance(media, VideoFile):
        return media.path.is_file()
    return media.path.is_dir() and any(path.suffix.lower() in IMAGE_SUFFIXES for path in media.path.glob(media.pattern))


def prepare_videos(segments: Sequence[Segment], options: VideoOptions) -> list[PreparedVideo | Skip]:
    """:func:`prepare_video` of each segment."""
    return [prepare_video(segment, options) for segment in segments]


def prepare_video(segment: Segment, options: VideoOptions) -> PreparedVideo | Skip:
    """Transcode one segment; unusable media becomes a Skip with its reason."""
    assert segment.media is not None
    if not has_media(segment.media):
        detail = f"{segment.media.path} does not exist or holds no frames"
        return Skip(segment.id, segment.split, "missing_media", detail, segment.origin)
    try:
        payload = transcode(segment.media, options)
        return PreparedVideo(payload, probe(payload))
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

    Raises DataError naming the tag in work when a process dies, e.g. killed for memory.
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
    """End this builder process when the one that started it is gone: kill -9 gives no other notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
