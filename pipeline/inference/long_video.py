"""A whole broadcast, or a stream that has not ended: spans of signing, each translated as a clip, as timed subtitles.

The video is read once. Only the pictures of the spans that are open are kept, so memory does not grow with its length,
and a subtitle appears as soon as its span is known.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import av
import numpy as np

from pipeline.errors import RecipeError
from pipeline.inference.generate import GenerationOptions
from pipeline.inference.translate import Translator
from shards.media.motion import Motion, PauseSpans, Span, SpanOptions
from shards.media.playback import Playback, play
from shards.media.video import encode_pictures
from shards.schema import Crop

_REMEMBERED = 16
"""Sentences that a prompt may show of those before."""
_LEAST_WORDS = 2
"""Words that two texts must share at their border before one copy is dropped: a single one may be said twice."""


@dataclass(frozen=True, slots=True)
class Subtitle:
    """One translated span of a long video."""

    start_seconds: float
    end_seconds: float
    text: str
    frames: int
    """Frames the encoder saw."""

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


class Spans(Protocol):
    """Finds spans while frames come (`PauseSpans`, `GivenSpans`)."""

    skipped: int

    @property
    def oldest(self) -> int: ...
    def push(self, motion: float) -> list[Span]: ...
    def finish(self) -> list[Span]: ...


@dataclass(frozen=True, slots=True)
class Clip:
    """One span as the encoder sees it."""

    span: Span
    frames_THWC: np.ndarray
    start_seconds: float
    end_seconds: float


def longest_seconds(translator: Translator) -> float:
    """How much video the model takes at once without leaving out more frames than in training."""
    sizes = translator.processor.options
    return sizes.max_frames * sizes.frame_stride / (translator.form.fps or 25.0)


def clips(translator: Translator, playback: Playback, spans: Spans) -> Iterator[Clip]:
    """The spans of a video in order of their ends. At most the pictures since `spans.oldest` are in memory."""
    kept: collections.deque[av.VideoFrame] = collections.deque()
    motion, first = Motion(), 0

    def clip(span: Span) -> Clip:
        pictures = (kept[number] for number in range(span.first - first, span.last - first))
        payload = encode_pictures(pictures, playback.rate, translator.form, playback.where)
        frames_THWC = translator.frames(payload, playback.where)
        return Clip(span, frames_THWC, playback.seconds(span.start), playback.seconds(span.stop))

    for picture in playback.pictures:
        kept.append(picture)
        yield from map(clip, spans.push(motion(picture)))
        while kept and first < spans.oldest:
            kept.popleft()
            first += 1
    yield from map(clip, spans.finish())


@dataclass(frozen=True, slots=True)
class LongVideo:
    """What to translate, and where its spans come from."""

    source: Path | BinaryIO
    """File, or an open stream."""
    spans: SpanOptions = field(default_factory=SpanOptions)
    make_spans: Callable[[Playback], Spans] | None = None
    """Given spans instead of those between pauses."""
    crop: Crop | None = None
    """Only this part of every picture."""
    batch: int = 1
    """Spans translated together; 1 gives each subtitle as early as possible."""


@dataclass(slots=True)
class LongReport:
    """What became of a long video."""

    subtitles: int = 0
    skipped: int = 0
    """Runs of motion too short for a sentence, or given spans outside the video."""
    without_text: int = 0
    """Spans whose translation is empty, or repeats the one before: no subtitle."""


def translate_long(
    translator: Translator, video: LongVideo, options: GenerationOptions, report: LongReport | None = None
) -> Iterator[Subtitle]:
    """Subtitles of a video in order of their ends.

    Args:
        translator: the model.
        video: source and spans.
        options: search options.
        report: counts what was found, complete when the iterator is.

    Raises:
        DataError: the video cannot be read; subtitles until then have been given.
        OptionError: the spans do not fit what the model takes at once.
        RecipeError: more new tokens than the LLM has positions for, a model that reads no pictures, or a batch of
            sentences that need each other.
    """
    translator.check(options)
    if translator.reads_rows or translator.fused:
        raise RecipeError(
            "this model reads keypoints or stored features, a long video holds pictures: cut the rows of each sentence"
            " instead (`slt translate FILE --between 12.5-20`)."
        )
    if video.batch > 1 and "previous" in translator.processor.cues:
        raise RecipeError(
            f"--set batch={video.batch}: this model's prompt shows {{previous}}, so each sentence waits for the one"
            " before it; leave batch at 1."
        )
    report, said, before = report or LongReport(), "", list[str]()
    with play(video.source, translator.form, video.crop) as playback:
        spans = (
            PauseSpans(video.spans, playback.rate, longest_seconds(translator))
            if video.make_spans is None
            else video.make_spans(playback)
        )
        for batch in _batches(clips(translator, playback, spans), video.batch):
            texts = translator.translate_clips([clip.frames_THWC for clip in batch], options, before)
            before = [*before, *filter(None, texts)][-_REMEMBERED:]
            for clip, text in zip(batch, texts, strict=True):
                fresh = without_overlap(said, text) if clip.span.first < clip.span.start else text
                said = text
                report.skipped = spans.skipped
                if not fresh:
                    report.without_text += 1
                    continue
                report.subtitles += 1
                yield Subtitle(round(clip.start_seconds, 3), round(clip.end_seconds, 3), fresh, len(clip.frames_THWC))
        report.skipped = spans.skipped


def _batches(found: Iterator[Clip], size: int) -> Iterator[list[Clip]]:
    batch: list[Clip] = []
    for clip in found:
        batch.append(clip)
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def without_overlap(before: str, text: str) -> str:
    """``text`` without the words that it begins with and ``before`` ends in: both saw the frames around a cut.

    At least two words, compared without case and outer punctuation; characters in texts without spaces.
    """
    spaced = " " in before.strip() or " " in text.strip()
    said, says = (list(t) if not spaced else t.split() for t in (before.strip(), text.strip()))
    folded, fresh = ([word.casefold().strip(".,;:!?…") for word in words] for words in (said, says))
    for shared in range(min(len(said), len(says)), _LEAST_WORDS - 1, -1):
        if folded[-shared:] == fresh[:shared]:
            return ("" if not spaced else " ").join(says[shared:])
    return text.strip()
