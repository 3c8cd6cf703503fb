"""Captions to segments: ids made of times, and the published reasons to leave out a caption."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator

from shards.corpora.captions import Caption, sound_only
from shards.schema import Segment, VideoFile


def segment_ids(video: str, captions: Iterable[Caption]) -> Iterator[str]:
    """``video-START-END`` in milliseconds; a second caption at the same times gets ``.2``."""
    seen: collections.Counter[str] = collections.Counter()
    for caption in captions:
        start, end = (round(seconds * 1000) for seconds in (caption.start_seconds, caption.end_seconds))
        base = f"{video}-{start:08d}-{end:08d}"
        seen[base] += 1
        yield base if seen[base] == 1 else f"{base}.{seen[base]}"


def caption_segment(
    base: Segment,
    caption: Caption,
    seconds: tuple[float, float] = (0.0, math.inf),
    characters: int = 0,
    sounds: bool = False,
) -> Segment:
    """``base`` with a caption's text and times, and the reason if the caption is left out.

    Reasons: ``end_before_start``, ``too_short`` and ``too_long`` (outside ``seconds``), ``caption_too_long`` (more than
    ``characters``; 0: no limit), ``sound_only`` (unless ``sounds``).
    """
    assert isinstance(base.media, VideoFile)
    start, end = caption.start_seconds, caption.end_seconds
    lasting = round(end - start, 3)
    reason = base.excluded
    if not reason and lasting <= 0:
        reason = "end_before_start"
    elif not reason and not sounds and sound_only(caption.text):
        reason = "sound_only"
    elif not reason and not seconds[0] <= lasting <= seconds[1]:
        reason = "too_short" if lasting < seconds[0] else "too_long"
    elif not reason and 0 < characters < len(caption.text):
        reason = "caption_too_long"
    media = dataclasses.replace(base.media, start_seconds=start, end_seconds=end)
    return dataclasses.replace(base, text=caption.text, media=media, excluded=reason)
