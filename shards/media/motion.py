"""Where signing begins and ends, from motion alone and while the video plays: signers rest between sentences.

A frame's *motion* is the root mean square change of its reduced grey picture. A *span* is signing between two pauses.
No model and no annotation is needed; a trained segmenter (Moryossef et al., arXiv 2310.13960) finds more.
"""

from __future__ import annotations

import collections
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import av
import numpy as np

from shards.errors import OptionError

_CELL = 4
_SMOOTH_SECONDS, _MEMORY_SECONDS = 0.2, 60.0
_STILL = 0.2
"""Grey levels (of 255) below which nothing moves, however quiet the rest is."""


class Span(NamedTuple):
    """Frames ``start`` to ``stop`` (exclusive) of a video, and those to read with them."""

    start: int
    stop: int
    first: int
    """First frame to show the model: before ``start`` where signing goes on across the border."""
    last: int
    """The frame behind the last one to show."""


@dataclass(frozen=True)
class SpanOptions:
    """How motion becomes spans."""

    pause_seconds: float = 0.5
    """The hands rest this long between two spans; also how long after its end a span is known."""
    pause_motion: float = 0.15
    """Rest: less motion than this share of the way from the quietest to the liveliest of the last minute."""
    pad_seconds: float = 0.2
    """Kept of the rest before and after; at most the pause."""
    min_seconds: float = 0.6
    """Less motion than this is no sentence: left out, and counted."""
    max_seconds: float = 0.0
    """Longer signing is cut at its quietest moment; 0: what the model takes."""
    overlap_seconds: float = 0.4
    """Shown to the model on both sides of such a cut, so that no sign is lost in it."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} {getattr(self, name):g}"
            for name in ("pause_seconds", "pad_seconds", "min_seconds", "max_seconds", "overlap_seconds")
            if not getattr(self, name) >= 0
        ]
        if wrong or not 0 < self.pause_motion < 1 or not 0 < self.pause_seconds >= self.pad_seconds:
            raise OptionError(
                f"{', '.join(wrong) or self._settings()}: times are not negative, pause_motion lies between 0 and 1,"
                " pause_seconds is above 0 and at least pad_seconds",
                where="spans",
                fix="correct the option",
            )
        if self.max_seconds and self.max_seconds < 2 * self.least_seconds():
            raise OptionError(
                f"max_seconds {self.max_seconds:g} is too short for {self._settings()}",
                where="spans",
                fix=f"give at least {2 * self.least_seconds():g} seconds, or lower the others",
            )

    def least_seconds(self) -> float:
        """Below twice this length a cut could not keep pause, overlap and shortest span apart."""
        return max(self.min_seconds, self.pause_seconds, 2 * self.overlap_seconds)

    def delay_seconds(self) -> float:
        """How long after the end of a sentence its span is known; signing without a pause is cut at max_seconds."""
        return self.pause_seconds + _SMOOTH_SECONDS

    def _settings(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in vars(self).items() if name != "max_seconds")


class Motion:
    """Motion of each picture against the one before it, in grey levels; 0 for the first one."""

    def __init__(self) -> None:
        self._before: np.ndarray | None = None

    def __call__(self, picture: av.VideoFrame) -> float:
        """``picture``: yuv420p. Raises nothing; pictures of one video have one size."""
        plane: Any = picture.planes[0]  # PyAV's types do not say that it is a buffer
        grey_HW = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: picture.height, : picture.width]
        rows, columns = max(1, picture.height // _CELL), max(1, picture.width // _CELL)
        cells = grey_HW[: rows * _CELL, : columns * _CELL].reshape(rows, -1, columns, _CELL)
        reduced = cells.mean(axis=(1, 3), dtype=np.float32)
        before, self._before = self._before, reduced
        return 0.0 if before is None else float(np.sqrt(np.square(reduced - before).mean()))


class PauseSpans:
    """Spans between pauses, found while the frames come.

    Args:
        options: what counts as a pause.
        rate: frames per second.
        max_seconds: longest span with its overlaps; what the model takes.
    """

    def __init__(self, options: SpanOptions, rate: float, max_seconds: float) -> None:
        def frames(seconds: float) -> int:
            return max(1, round(seconds * rate))

        longest = min(options.max_seconds or max_seconds, max_seconds)
        if longest < 2 * options.least_seconds():
            raise OptionError(
                f"the model takes {longest:g} seconds at once, which leaves no room for these spans",
                where="spans",
                fix=f"lower min_seconds, pause_seconds and overlap_seconds: all below {longest / 4:g}",
            )
        self.options, self.rate = options, rate
        self.skipped = 0
        """Runs of motion shorter than min_seconds."""
        self._pause, self._least = frames(options.pause_seconds), frames(options.min_seconds)
        self._pad, self._overlap = round(options.pad_seconds * rate), round(options.overlap_seconds * rate)
        self._longest = int(longest * rate) - 2 * self._overlap
        self._recent: collections.deque[float] = collections.deque(maxlen=frames(_SMOOTH_SECONDS))
        self._minute: collections.deque[float] = collections.deque(maxlen=frames(_MEMORY_SECONDS))
        self._count, self._stop, self._threshold = 0, 0, _STILL
        self._open: int | None = None
        self._cut_before = False
        self._moved = self._began = -1
        self._levels: collections.deque[float] = collections.deque(maxlen=self._longest + self._overlap + 1)

    @property
    def oldest(self) -> int:
        """First frame that a later span may still show."""
        if self._open is not None:
            return self._first()
        return max(self._stop, self._count - self._pad - len(self._recent))

    def push(self, motion: float) -> list[Span]:
        """The next frame; spans that are complete now."""
        level = self._smoothed(motion)
        now, self._count = self._count, self._count + 1
        moves = level > self._threshold
        if self._open is None:
            if moves:
                self._open, self._cut_before = max(self._stop, now - len(self._recent) // 2 - self._pad), False
                self._began = self._moved = now
            return []
        if moves:
            self._moved = now
        if now - self._moved >= self._pause:
            return self._close()
        return [self._cut()] if self._count - self._open >= self._longest + self._overlap else []

    def finish(self) -> list[Span]:
        """The span that the end of the video completes, if any."""
        return [] if self._open is None else self._close()

    def _smoothed(self, motion: float) -> float:
        self._recent.append(motion)
        level = sum(self._recent) / len(self._recent)
        self._minute.append(level)
        self._levels.append(level)
        if self._count % max(1, round(self.rate / 2)) == 0:
            low, high = np.quantile(self._minute, (0.05, 0.9))
            low = min(low, high / 2)  # a minute without any rest shows no rest to compare with
            self._threshold = max(_STILL, float(low + self.options.pause_motion * (high - low)))
        return level

    def _first(self) -> int:
        assert self._open is not None
        return max(0, self._open - self._overlap) if self._cut_before else self._open

    def _close(self) -> list[Span]:
        assert self._open is not None
        stop = min(self._count, max(self._moved - len(self._recent) // 2 + 1, self._began + 1) + self._pad)
        stop = max(stop, self._open + 1)
        span = Span(self._open, stop, self._first(), stop)
        self._open, self._stop = None, stop
        if self._cut_before:  # what moves no longer than the overlap was shown with the span before
            return [span] if self._moved - self._began >= self._overlap else []
        if self._moved - self._began + 1 < self._least:
            self.skipped += 1
            return []
        return [span]

    def _cut(self) -> Span:
        """Cut where the hands move least, in the second half of what the span may hold."""
        assert self._open is not None
        levels = list(self._levels)[len(self._levels) - (self._count - self._open) :]
        half, last = len(levels) // 2, len(levels) - self._overlap
        cut = self._open + half + int(np.argmin(levels[half:last]))
        span = Span(self._open, cut, self._first(), cut + self._overlap)
        self._open, self._stop, self._cut_before, self._began = cut, cut, True, cut
        self._moved = max(self._moved, cut)
        return span


class GivenSpans:
    """Spans that somebody else found: subtitles, ELAN tiers, a table of times.

    Args:
        times: (start, end) in seconds.
        start_seconds: time of frame 0.
        rate: frames per second.
    """

    skipped = 0

    def __init__(self, times: list[tuple[float, float]], start_seconds: float, rate: float) -> None:
        frames = [(round((a - start_seconds) * rate), round((b - start_seconds) * rate)) for a, b in sorted(times)]
        self._waiting = collections.deque(Span(max(0, a), b, max(0, a), b) for a, b in frames if b > max(0, a))
        self.skipped = len(times) - len(self._waiting)
        """Spans that end before the video begins."""
        self._count = 0

    @property
    def oldest(self) -> int:
        """First frame that a later span may still show."""
        return self._waiting[0].first if self._waiting else self._count

    def push(self, motion: float) -> list[Span]:
        """The next frame; spans that are complete now, in order of their ends."""
        del motion
        self._count += 1
        begun = itertools.takewhile(lambda span: span.first < self._count, self._waiting)
        done = sorted((span for span in begun if span.last <= self._count), key=lambda span: span.last)
        for span in done:
            self._waiting.remove(span)
        return done

    def finish(self) -> list[Span]:
        """Spans that the end of the video cuts off; those behind it are counted as skipped."""
        cut = [Span(s.start, self._count, s.first, self._count) for s in self._waiting if s.start < self._count]
        self.skipped += len(self._waiting) - len(cut)
        self._waiting.clear()
        return cut
