"""A folder of videos with subtitles of the same name: WMT-SLT, SwissSLi, PUCP-PSL, DGS, How2Sign's vtt, your own.

    videos/lesson 1.mp4            any names, folders nested or not; .mp4, .mkv, .webm and others
    videos/lesson 1.srt            .srt, .vtt, .ttml, .json3 or ELAN's .eaf, here or in a separate folder
    videos/lesson 1.de.srt         several tracks: ``--tracks de``; also ``lesson 1_de.srt``
    1413451_1a1.mp4, 1413451.eaf   videos with longer names: ``--video-suffix _1a1``

One segment per caption. ``--tiers`` names the tiers of ELAN files to read; a tier's participant is the signer.
Captions without speech (``[Musik]``, ``* Applaus *``, ``[NOT-SIGNED]``) are left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.corpora.caption_segments import caption_segment, segment_ids
from shards.corpora.captions import Caption, read_captions
from shards.corpora.elan import SUFFIX, read_elan
from shards.corpora.media_files import check_folder
from shards.corpora.rows import read_lines
from shards.corpora.splits import check_fractions, drawn_split
from shards.corpora.subtitle_files import FORMATS, Video, match_subtitles
from shards.corpora.table import LANGUAGE
from shards.errors import DataError, OptionError
from shards.schema import SPLIT_NAME, Segment, VideoFile


@dataclass(frozen=True, slots=True)
class _SignedCaption:
    """One caption and who signs it."""

    caption: Caption
    signer: str
    origin: str


@dataclass(kw_only=True)
class Subtitles:
    """Segments of a folder of videos with subtitles."""

    NAME = "subtitles"

    videos: Path
    """Folder with the videos, nested or not."""
    subtitles: Path | None = None
    """Folder with the subtitles; default: the videos' folder."""
    tracks: list[str] = field(default_factory=list)
    """Names between a video's name and the suffix of its subtitles (``de`` of ``a.de.srt``), preferred first; default:
    the only one."""
    tiers: list[str] = field(default_factory=list)
    """Tiers of ELAN files that hold the text; default: the only one with annotations."""
    video_suffix: str = ""
    """End of the videos' names that their subtitles lack: ``_1a1`` for ``a_1a1.mp4`` with ``a.eaf``."""
    corpus: str = "subtitles"
    """Name of the corpus in index, metrics and errors."""
    language: str = ""
    """BCP-47 code of the text, for example ``de``."""
    sign_language: str = ""
    """ISO 639-3 code, for example ``gsg``."""
    split: str = ""
    """Split of all videos: train, dev, test or test_...; empty: by the lists and fractions below."""
    dev_videos: Path | None = None
    """List of the videos of the split dev, one name without suffix per line."""
    test_videos: Path | None = None
    dev_fraction: float = 0.0
    """Without lists: this part of the videos, chosen by a hash of the name."""
    test_fraction: float = 0.0
    split_seed: int = 0
    shift_seconds: float = 0.0
    """Added to all times: an interpreter signs after the sound."""
    min_seconds: float = 0.0
    """Shorter captions are excluded."""
    max_seconds: float = 0.0
    """Longer captions are excluded; 0: none."""
    max_characters: int = 0
    """Captions with more are excluded; 0: none."""
    sounds: bool = False
    """Keep captions without speech, like ``[Musik]``."""
    settings: dict[str, object] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.corpus
        where = f"corpus {self.corpus}"
        self.videos = check_folder(Path(self.videos), "the videos")
        self.subtitles = check_folder(Path(self.subtitles or self.videos), f"subtitles ({', '.join(FORMATS)})")
        check_fractions(self.dev_fraction, self.test_fraction, where)
        if self.split and not SPLIT_NAME.fullmatch(self.split):
            raise OptionError(
                f"{self.split!r} cannot be a split", where=where, fix="write train, dev, test or the like"
            )
        for key, example in (("language", "de"), ("sign_language", "gsg")):
            if (code := getattr(self, key)) and not LANGUAGE.match(code):
                raise OptionError(f"{key}={code!r} is no code", where=where, fix=f"write for example {example}")
        if self.min_seconds < 0 or self.max_seconds < 0 or 0 < self.max_seconds <= self.min_seconds:
            what = f"min_seconds {self.min_seconds} and max_seconds {self.max_seconds} leave no caption"
            raise OptionError(what, where=where, fix="correct the options")
        names = ("tracks", "tiers", "shift_seconds", "min_seconds", "max_seconds", "max_characters", "sounds")
        self.settings = {name: getattr(self, name) for name in names}

    def segments(self) -> Iterator[Segment]:
        """Video by video in order of their names, every caption by its time.

        Excluded, one per video or file: ``no_video``, ``no_subtitles``, ``unreadable_subtitles``, ``no_tier`` (none of
        the named ones); one per caption: the reasons of
        :func:`shards.corpora.caption_segments.caption_segment`.

        Raises:
            OptionError: several tracks or tiers and none chosen, or the chosen ones are in no file.
            DataError: lists that name other videos.
        """
        assert self.subtitles is not None
        tiers: dict[str, bool] = {}
        matches = match_subtitles(self.videos, self.subtitles, self.video_suffix, self.tracks)
        split_of = self._splits(matches)
        for video in matches:
            base = Segment(
                corpus=self.corpus,
                id=video.name,
                split=split_of[video.name],
                text="",
                media=VideoFile(video.path or self.videos / f"{video.name}{self.video_suffix}.mp4"),
                language=self.language,
                sign_language=self.sign_language,
                origin=str(video.subtitles or video.path),
            )
            if video.path is None or video.subtitles is None:
                yield dataclasses.replace(base, excluded="no_video" if video.path is None else "no_subtitles")
                continue
            try:
                signed = self._read(video.path, video.subtitles, tiers)
            except OptionError:
                raise
            except DataError as error:
                origin = f"{error.where} ({error.what})"
                yield dataclasses.replace(base, excluded="unreadable_subtitles", origin=origin)
                continue
            yield from self._caption_segments(base, signed)
        if self.tiers and tiers and not any(tiers.values()):
            raise OptionError(
                f"no tier {' or '.join(map(repr, self.tiers))} in any file; there are {', '.join(tiers)}",
                where=f"corpus {self.corpus}",
                fix="name tiers that are there: --tiers NAME,NAME",
            )

    def _caption_segments(self, base: Segment, signed: list[_SignedCaption] | None) -> Iterator[Segment]:
        if not signed:
            yield dataclasses.replace(base, excluded="no_tier" if signed is None else "no_subtitles")
            return
        captions = [item.caption for item in signed]
        limits = (self.min_seconds, self.max_seconds or math.inf)
        for item, segment_id in zip(signed, segment_ids(base.id, captions), strict=True):
            one = dataclasses.replace(base, id=segment_id, signer=item.signer, origin=item.origin)
            yield caption_segment(one, item.caption, limits, self.max_characters, self.sounds)

    def _read(self, video: Path, path: Path, tiers: dict[str, bool]) -> list[_SignedCaption] | None:
        """The captions of a file in order of time; None if it has none of the chosen tiers.

        ``tiers``: receives the names of its tiers, and whether each is among the chosen ones.
        """
        if path.suffix.lower() != SUFFIX:
            return [
                _SignedCaption(self._moved(caption), "", f"{path}:{caption.line}") for caption in read_captions(path)
            ]
        elan = read_elan(path)
        tiers.update((tier.name, tier.name in self.tiers) for tier in elan.tiers)
        chosen = elan.chosen(self.tiers, str(path))
        if self.tiers and not chosen:
            return None
        begin = elan.origins.get(video.stem, 0.0)
        signed = [
            _SignedCaption(self._moved(caption, begin), tier.participant, f"{path}: {tier.name} {caption.line}")
            for tier in chosen
            for caption in tier.captions
        ]
        return sorted(signed, key=lambda item: (item.caption.start_seconds, item.caption.end_seconds, item.origin))

    def _moved(self, caption: Caption, begin: float = 0.0) -> Caption:
        shift = self.shift_seconds + begin
        start, end = caption.start_seconds + shift, caption.end_seconds + shift
        return dataclasses.replace(caption, start_seconds=max(0.0, start), end_seconds=end)

    def _splits(self, videos: list[Video]) -> dict[str, str]:
        """Video -> split."""
        names = {video.name for video in videos}
        listed: dict[str, str] = {}
        for split, path in (("dev", self.dev_videos), ("test", self.test_videos)):
            for line, text in read_lines(path) if path else ():
                name, where = text.strip(), f"{path}:{line}"
                if name and name not in names:
                    fix = "list the videos by their paths below the folder, without suffix"
                    raise DataError(f"no video or subtitles {name!r}", where=where, fix=fix)
                if name and listed.setdefault(name, split) != split:
                    raise DataError(f"{name!r} is in dev and in test", where=where, fix="list each video once")
        fractions = (0.0, 0.0) if listed else (self.dev_fraction, self.test_fraction)
        return {
            name: self.split or listed.get(name) or drawn_split(name, self.split_seed, *fractions) for name in names
        }
