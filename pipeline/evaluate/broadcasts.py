"""Scores of subtitles for whole videos: where sentences were found, and what was said in them.

Segmentation measures follow Moryossef et al. (arXiv 2310.13960): agreement per frame, intersection over union of the
signing, and how many segments there are for each true one. Theirs tell three labels apart (begin, inside, outside);
subtitles say only where a sentence is, so ours are signing and rest.

A text is compared with the sentences it overlaps in time, whatever the number of subtitles on either side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.evaluate.metrics import Scores, score
from pipeline.evaluate.protocols import Protocol
from shards.corpora.captions import Caption
from shards.errors import DataError

SAME_SEGMENT = 0.5
"""Two segments are the same if their intersection over union is above this; only one of disjoint ones can be."""
Times = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Subtitled:
    """One video: its true subtitles and those of the model."""

    name: str
    seconds: float
    """Length of the video."""
    reference: Sequence[Caption]
    hypothesis: Sequence[Caption]


@dataclass(frozen=True, slots=True)
class Segmentation:
    """Agreement of segments, in percent but for the ratio."""

    segment_f1: float
    """Segments whose intersection over union with a true one is above one half."""
    segment_precision: float
    segment_recall: float
    frame_f1: float
    """Of each moment being signing or rest: mean of both labels' F1."""
    iou: float
    """Intersection over union of all moments of signing."""
    segments_per_reference: float
    reference_segments: int
    hypothesis_segments: int


@dataclass(frozen=True, slots=True)
class BroadcastScores:
    """All that is said of long videos."""

    sentences: Scores
    """One pair per true sentence: the texts that overlap it most, or an empty one."""
    videos: Scores
    """One pair per video: all of its texts as one. Does not depend on where they were cut."""
    segmentation: Segmentation
    number_of_videos: int

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def score_broadcasts(videos: Sequence[Subtitled], protocol: Protocol) -> BroadcastScores:
    """Score long videos.

    Raises:
        DataError: no video, or one without a true sentence.
    """
    for video in videos:
        if not any(caption.text.strip() for caption in video.reference):
            raise DataError("no true sentence to compare with", where=video.name, fix="leave this video out")
    pairs = [pair for video in videos for pair in matched_texts(video)]
    whole = [(_joined(video.hypothesis), _joined(video.reference)) for video in videos]
    return BroadcastScores(
        sentences=score([said for said, _ in pairs], [true for _, true in pairs], protocol),
        videos=score([said for said, _ in whole], [true for _, true in whole], protocol),
        segmentation=segmentation(videos),
        number_of_videos=len(videos),
    )


def matched_texts(video: Subtitled) -> list[tuple[str, str]]:
    """(text of the model, true text) for every true sentence with a text, in order of time.

    Each subtitle of the model belongs to the sentence it overlaps longest, or else to the nearest one: what is said
    too much counts against it.
    """
    sentences = [caption for caption in video.reference if caption.text.strip()]
    said: list[list[Caption]] = [[] for _ in sentences]
    for caption in video.hypothesis:
        gaps = [-_overlap(_times(caption), _times(sentence)) for sentence in sentences]
        said[gaps.index(min(gaps))].append(caption)
    return [(_joined(texts), sentence.text) for texts, sentence in zip(said, sentences, strict=True)]


def segmentation(videos: Sequence[Subtitled]) -> Segmentation:
    """Agreement of the segments of all videos together."""
    same = found = true = 0
    both = either = length = 0.0
    for video in videos:
        reference, hypothesis = ([_times(c) for c in captions] for captions in (video.reference, video.hypothesis))
        same += same_segments(reference, hypothesis)
        found, true = found + len(hypothesis), true + len(reference)
        here, there = united(reference), united(hypothesis)
        shared = sum(max(0.0, _overlap(a, b)) for a in here for b in there)
        all_time = sum(b - a for a, b in here) + sum(b - a for a, b in there) - shared
        both, either, length = both + shared, either + all_time, length + max(video.seconds, all_time)
    precision, recall = _part(same, found), _part(same, true)
    signing, rest = _part(2 * both, both + either), _part(2 * (length - either), 2 * length - both - either)
    return Segmentation(
        segment_f1=_part(2 * same, found + true),
        segment_precision=precision,
        segment_recall=recall,
        frame_f1=(signing + rest) / 2,
        iou=_part(both, either),
        segments_per_reference=found / true if true else 0.0,
        reference_segments=true,
        hypothesis_segments=found,
    )


def same_segments(reference: Sequence[Times], hypothesis: Sequence[Times]) -> int:
    """Pairs of segments that are the same; each segment is in one pair at most, the most alike pairs first."""
    alike = sorted(
        ((share, i, j) for i, a in enumerate(reference) for j, b in enumerate(hypothesis) if (share := iou(a, b)) > 0),
        key=lambda found: (-found[0], found[1], found[2]),
    )
    used: tuple[set[int], set[int]] = (set(), set())
    pairs = 0
    for share, i, j in alike:
        if share > SAME_SEGMENT and i not in used[0] and j not in used[1]:
            used[0].add(i)
            used[1].add(j)
            pairs += 1
    return pairs


def iou(a: Times, b: Times) -> float:
    """Intersection over union of two times; 0 where they do not overlap."""
    shared = max(0.0, _overlap(a, b))
    return shared / (a[1] - a[0] + b[1] - b[0] - shared)


def united(times: Sequence[Times]) -> list[Times]:
    """The same moments as disjoint times in order."""
    merged: list[Times] = []
    for start, end in sorted(times):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _overlap(a: Times, b: Times) -> float:
    """Seconds that two times share; below 0 the gap between them."""
    return min(a[1], b[1]) - max(a[0], b[0])


def _times(caption: Caption) -> Times:
    return caption.start_seconds, caption.end_seconds


def _joined(captions: Sequence[Caption]) -> str:
    return " ".join(caption.text for caption in captions if caption.text.strip())


def _part(share: float, whole: float) -> float:
    """Percent; all of nothing is 100."""
    return 100.0 * share / whole if whole else 100.0
