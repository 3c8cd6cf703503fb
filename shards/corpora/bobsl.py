"""BOBSL, the BBC-Oxford British Sign Language corpus (Albanie et al., 2021): interpreted television, release v1.4.

    original_data/videos/mp4/<episode>.mp4
    original_data/metadata/subset2episode.json     {"train": [episode, ...], "val": [...], "test": [...], ...}
    automatic_annotations/signing_aligned_subtitles/audio_aligned_heuristic_correction/<episode>.vtt
    automatic_annotations/signing_aligned_subtitles/auto_sat_aligned/<episode>.vtt
    manual_annotations/signing_aligned_subtitles/<episode>.vtt

Under the BBC's agreement, for academic research only. The default paths are those that public code for v1.4 reads; an
option overrides each. Subtitles aligned with the audio run ahead of the interpreter. Few episodes have manually aligned
ones: they form the splits ``train_aligned``, ``dev_aligned`` and ``test_aligned``, read only if named in ``splits``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.corpora.caption_segments import caption_segment, segment_ids
from shards.corpora.captions import Caption, read_captions
from shards.corpora.media_files import VIDEO_SUFFIXES, check_folder, files_by_stem
from shards.corpora.rows import file_stem, known_splits, read_json, read_lines
from shards.errors import DataError, OptionError
from shards.names import ByName
from shards.schema import Segment, VideoFile

EPISODE_SPLITS = {"train": ("train",), "dev": ("val", "dev"), "test": ("test",)}
ALIGNED = "_aligned"
_SUBTITLE_SUFFIXES = (".vtt", ".srt")
_METADATA = "original_data/metadata/subset2episode.json"
_LISTS = ("{}.txt", "bobsl_align_{}.txt")


@dataclass(kw_only=True)
class Bobsl:
    """Segments of BOBSL: one per subtitle."""

    NAME = "bobsl"

    root: Path
    """The unpacked release: the folder that holds ``original_data`` and the annotations."""
    splits: list[str] = field(default_factory=lambda: list(EPISODE_SPLITS))
    """Which of train, dev, test (subtitles below) and train_aligned, dev_aligned, test_aligned (manual ones)."""
    subtitles: Path = Path("automatic_annotations/signing_aligned_subtitles/audio_aligned_heuristic_correction")
    """Folder of ``<episode>.vtt`` or ``.srt``, relative to the root."""
    aligned_subtitles: Path = Path("manual_annotations/signing_aligned_subtitles")
    """Folder of the manually aligned subtitles, relative to the root."""
    videos: Path = Path("original_data/videos/mp4")
    """Folder of the episodes, relative to the root."""
    episodes: Path = Path(_METADATA)
    """``subset2episode.json``, or a folder with train.txt, val.txt, test.txt (or bobsl_align_train.txt, ...) of one
    episode per line; relative to the root."""
    shift_seconds: float = 0.0
    """Added to the times of ``subtitles`` (not of the manually aligned ones): the interpreter comes after the audio."""
    min_seconds: float = 0.0
    """Shorter subtitles are excluded."""
    max_seconds: float = 0.0
    """Longer subtitles are excluded; 0: none."""
    settings: dict[str, object] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.NAME
        self.root = check_folder(Path(self.root), "original_data and the annotation folders")
        known_splits(self.splits, [*EPISODE_SPLITS, *(split + ALIGNED for split in EPISODE_SPLITS)], self.NAME)
        if self.min_seconds < 0 or 0 < self.max_seconds <= self.min_seconds or self.max_seconds < 0:
            raise OptionError(
                f"min_seconds {self.min_seconds} and max_seconds {self.max_seconds} leave no subtitle",
                where="corpus bobsl",
                fix="correct the options",
            )
        self.settings = {name: getattr(self, name) for name in ("shift_seconds", "min_seconds", "max_seconds")}
        self.settings["subtitles"] = self.subtitles.name

    def segments(self) -> Iterator[Segment]:
        """Split by split, episode by episode, every subtitle by its time.

        An episode without video or subtitles, or with subtitles that cannot be read, is one excluded segment:
        ``no_video``, ``no_subtitles``, ``unreadable_subtitles``.
        """
        folder = check_folder(self.root / self.videos, "the episodes' videos")
        videos = files_by_stem(folder, VIDEO_SUFFIXES)
        episodes = self._episodes()
        for split in self.splits:
            aligned = split.endswith(ALIGNED)
            subtitle_folder = self.root / (self.aligned_subtitles if aligned else self.subtitles)
            files = files_by_stem(check_folder(subtitle_folder, "the subtitles <episode>.vtt"), _SUBTITLE_SUFFIXES)
            for episode, origin in episodes[split.removesuffix(ALIGNED)]:
                reason = "no_video" if episode not in videos else "" if episode in files else "no_subtitles"
                video = VideoFile(videos.get(episode, folder / f"{episode}.mp4"))
                if reason:
                    yield self._excluded(episode, split, video, reason, origin)
                else:
                    yield from self._subtitles(episode, split, video, files[episode])

    def _subtitles(self, episode: str, split: str, video: VideoFile, path: Path) -> Iterator[Segment]:
        try:
            captions = read_captions(path)
        except DataError as error:
            origin = f"{error.where} ({error.what})"
            yield self._excluded(episode, split, video, "unreadable_subtitles", origin)
            return
        if not captions:
            yield self._excluded(episode, split, video, "no_subtitles", str(path))
        shift = 0.0 if split.endswith(ALIGNED) else self.shift_seconds
        prefix = f"{split}/{episode}" if split.endswith(ALIGNED) else episode
        for caption, segment_id in zip(captions, segment_ids(prefix, captions), strict=True):
            shifted = Caption(
                max(0.0, caption.start_seconds + shift), caption.end_seconds + shift, caption.text, caption.line
            )
            base = Segment(
                corpus=self.NAME,
                id=segment_id,
                split=split,
                text="",
                media=video,
                language="en",
                sign_language="bfi",
                origin=f"{path}:{caption.line}",
            )
            yield caption_segment(base, shifted, (self.min_seconds, self.max_seconds or float("inf")))

    def _excluded(self, episode: str, split: str, video: VideoFile, reason: str, origin: str) -> Segment:
        return Segment(
            corpus=self.NAME, id=f"{split}/{episode}", split=split, text="", media=video, origin=origin, excluded=reason
        )

    def _episodes(self) -> dict[str, list[tuple[str, str]]]:
        """Split -> (episode, where it is listed). Raises DataError for an episode that is listed twice."""
        source = self.root / self.episodes
        listed = _from_lists(source) if source.is_dir() else _from_subsets(source)
        seen: ByName[str] = ByName()
        for split, entries in listed.items():
            for episode, origin in entries:
                if episode in seen:
                    raise DataError(
                        f"the episode {episode} is listed twice: in {seen[episode]} and {split}",
                        where=origin,
                        fix="use the official split lists",
                    )
                seen[episode] = split
        return listed


def _from_subsets(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Episodes from ``subset2episode.json``; subsets of other names (the challenge's) have no subtitles."""
    if not path.is_file():
        raise DataError(
            f"no {path.name}: it lists the episodes of each split",
            where=str(path.parent),
            fix=f"pass the folder that holds {_METADATA} as --root, or a list with --episodes",
        )
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"no object of subsets but a {type(content).__name__}", where=str(path), fix=f"use {_METADATA}")
    episodes_by_split = {}
    for split, names in EPISODE_SPLITS.items():
        subset = next((name for name in names if name in content), "")
        entries = content.get(subset)
        if not isinstance(entries, list):
            raise DataError(
                f"no list of {' or '.join(names)} episodes; found {sorted(content)}",
                where=str(path),
                fix=f"use {_METADATA}",
            )
        episodes_by_split[split] = [
            (file_stem(str(episode), f"{path}: {subset}"), f"{path}: {subset}") for episode in entries
        ]
    return episodes_by_split


def _from_lists(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Episodes from one text file per split."""
    episodes_by_split = {}
    for split, names in EPISODE_SPLITS.items():
        paths = [folder / pattern.format(name) for name in names for pattern in _LISTS]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise DataError(
                f"no episode list for {split}: looked for {', '.join(path.name for path in paths)}",
                where=str(folder),
                fix="name the lists so, or use subset2episode.json",
            )
        episodes_by_split[split] = [
            (file_stem(text.strip(), f"{path}:{line}"), f"{path}:{line}")
            for line, text in read_lines(path)
            if text.strip()
        ]
    return episodes_by_split
