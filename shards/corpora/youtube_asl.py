"""YouTube-ASL (Uthus et al., 2023) and YouTube-SL-25 (Tanzer and Zhang, 2024): lists of video ids.

    youtube_asl_video_ids.txt     one id per line; 11,093 videos, 610,193 captions when published
    youtube-sl-25-metadata.csv    id,ISO 639-3 code of the sign language, without header
    videos/<id>.mp4               fetched by yourself, e.g. with yt-dlp; .webm, .mkv and others as well
    videos/<id>.en.vtt            captions: .vtt, .srt, .json3, .json or .ttml, with the language in the name or without

The ids are CC BY 4.0, the videos belong to their uploaders, and some are gone: an id without video or without captions
is one excluded segment, so that the report says how many. Captions are filtered as the YouTube-ASL paper does: at most
300 characters, 0.2 to 60 seconds. Its third filter, exactly one person in the picture, needs a detector: ``people``
reads a detector's counts. There are no official splits: everything is ``train``, except what the id lists name.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.corpora.caption_segments import caption_segment, segment_ids
from shards.corpora.captions import Caption, read_track
from shards.corpora.media_files import VIDEO_SUFFIXES, check_folder, files_by_stem
from shards.corpora.rows import read_table
from shards.corpora.table import seconds
from shards.corpora.youtube_files import (
    CaptionFile,
    caption_files,
    read_ids,
    read_openasl_evaluation,
    read_people,
    read_spoken_languages,
)
from shards.errors import DataError, OptionError
from shards.schema import Segment, VideoFile

DEFAULT_SIGN_LANGUAGE = "ase"
_TABLE_COLUMNS = ("video_name", "start_time", "end_time", "caption")


@dataclass(kw_only=True)
class YouTubeASL:
    """Segments of YouTube-ASL: one per caption."""

    NAME = "youtube_asl"

    ids: Path
    """The list of ids; lines ``id,code`` name the sign language of each video."""
    videos: Path
    """Folder with ``<id>.mp4`` and the like, nested or not."""
    captions: Path | None = None
    """Folder with ``<id>.<language>.vtt`` and the like; default: the videos' folder."""
    table: Path | None = None
    """Captions from one tsv with the columns video_name, start_time, end_time, caption instead of caption files."""
    languages: list[str] = field(default_factory=list)
    """Caption languages, preferred first (``en`` includes ``en-GB``); default: by the sign language."""
    spoken_languages: Path | None = None
    """tsv with the columns sign_language and language, in addition to the built-in pairs (ase: en, gsg: de)."""
    sign_languages: list[str] = field(default_factory=list)
    """Only videos in these sign languages; the others are excluded. Default: all."""
    automatic: bool = False
    """Accept speech recognition for videos without written captions."""
    sounds: bool = False
    """Keep captions that describe only sounds, like ``[Music]``."""
    max_characters: int = 300
    min_seconds: float = 0.2
    max_seconds: float = 60.0
    people: Path | None = None
    """tsv with the columns segment (its id here) and people: segments that do not show exactly one are excluded."""
    dev_ids: Path | None = None
    """Ids of the videos that become the split dev."""
    test_ids: Path | None = None
    exclude_ids: Path | None = None
    """Ids of videos to leave out."""
    openasl: Path | None = None
    """``openasl-v1.0.tsv``: captions that overlap a clip of its dev or test split are excluded."""
    settings: dict[str, object] = field(init=False, default_factory=dict)
    published: dict[str, int] = field(init=False, default_factory=lambda: {"train": 610193})

    def __post_init__(self) -> None:
        self.name = self.NAME
        self.videos = check_folder(Path(self.videos), "videos named <id>.mp4")
        self.captions = check_folder(Path(self.captions or self.videos), "captions named <id>.en.vtt")
        if not 0 <= self.min_seconds < self.max_seconds or self.max_characters < 0:
            raise OptionError(
                f"min_seconds {self.min_seconds}, max_seconds {self.max_seconds}, max_characters {self.max_characters}"
                " leave nothing",
                where=f"corpus {self.name}",
                fix="correct the options",
            )
        names = ("languages", "sign_languages", "automatic", "sounds", "max_characters", "min_seconds", "max_seconds")
        self.settings = {name: getattr(self, name) for name in names}
        self.notes = () if self.people else ("the filter for exactly one person is not applied: add --people FILE",)
        if self.dev_ids or self.test_ids or self.sign_languages:
            self.published = {}

    def segments(self) -> Iterator[Segment]:
        """Video by video in the order of the ids, or row by row in the order of the table.

        Excluded, one per video: ``duplicate_id``, ``excluded_id``, ``other_sign_language``, ``no_video``,
        ``no_captions``, ``no_captions_in_language``, ``automatic_captions``, ``unreadable_captions``; one per caption:
        ``in_openasl_evaluation``, ``not_one_person``, ``people_unknown``, ``unknown_id`` (table) and the reasons of
        :func:`shards.corpora.caption_segments.caption_segment`.

        Raises:
            DataError: a list or table that cannot be used, or a sign language without caption language.
        """
        context = _Context(self)
        listed: dict[str, Segment] = {}
        for line, video, sign_language in read_ids(self.ids):
            segment = context.video(video, sign_language, f"{self.ids}:{line}")
            if video in listed:
                yield dataclasses.replace(segment, id=f"{video}#{line}", excluded="duplicate_id")
            else:
                listed[video] = segment
        context.check_listed(listed)
        if self.table is not None:
            yield from self._from_table(context, listed)
            return
        files = caption_files(self.captions or self.videos)
        for video, segment in listed.items():
            if segment.excluded:
                yield segment
            else:
                yield from self._from_files(context, segment, files.get(video, []))

    def _from_files(self, context: _Context, base: Segment, files: list[CaptionFile]) -> Iterator[Segment]:
        """The captions of one video, from the best of its files."""
        if not files:
            yield dataclasses.replace(base, excluded="no_captions")
            return
        languages = context.caption_languages(base.sign_language)
        ranked = sorted((rank, file) for file in files if (rank := file.rank(languages)) is not None)
        reason, detail = "no_captions_in_language", f"{base.origin}: {', '.join(file.path.name for file in files)}"
        for _, file in ranked:
            try:
                track = read_track(file.path)
            except DataError as error:
                reason, detail = "unreadable_captions", f"{error.where} ({error.what})"
                break
            if (track.automatic or file.automatic) and not self.automatic:
                reason, detail = "automatic_captions", str(file.path)
                continue
            if not track.captions:
                reason, detail = "no_captions", str(file.path)
                continue
            base = dataclasses.replace(base, language=file.text_language or languages[0])
            for caption, segment_id in zip(track.captions, segment_ids(base.id, track.captions), strict=True):
                yield context.segment(base, caption, segment_id, f"{file.path}:{caption.line}")
            return
        yield dataclasses.replace(base, excluded=reason, origin=detail)

    def _from_table(self, context: _Context, listed: dict[str, Segment]) -> Iterator[Segment]:
        """The rows of the table; then the ids that have none."""
        assert self.table is not None
        with_rows: set[str] = set()
        repeated: collections.Counter[str] = collections.Counter()
        for line, row in read_table(self.table, "\t", quoting=False, needed=_TABLE_COLUMNS):
            origin = f"{self.table}:{line}"
            name = row["video_name"]
            video = name if name in listed else name.rpartition(".")[0] or name
            start, end = (seconds(row[key].strip(), f"{origin} {key}") for key in ("start_time", "end_time"))
            if start is None or end is None:
                raise DataError(f"the row of {name} has no times", where=origin, fix="fill start_time and end_time")
            base = listed.get(video) or context.unknown(video, origin)
            with_rows.add(video)
            caption = Caption(start, end, " ".join(row["caption"].split()), line)
            (segment_id,) = segment_ids(video, [caption])
            repeated[segment_id] += 1
            segment_id += f".{repeated[segment_id]}" if repeated[segment_id] > 1 else ""
            yield context.segment(base, caption, segment_id, origin)
        for video, segment in listed.items():
            if video not in with_rows:
                yield dataclasses.replace(segment, excluded=segment.excluded or "no_captions")


class _Context:
    """Contents of the files that the options name, read once per pass over the corpus."""

    def __init__(self, corpus: YouTubeASL) -> None:
        self.corpus = corpus
        self.files = files_by_stem(corpus.videos, VIDEO_SUFFIXES)
        self.spoken = read_spoken_languages(corpus.spoken_languages)
        lists = {"dev": corpus.dev_ids, "test": corpus.test_ids, "exclude": corpus.exclude_ids}
        self.lists = {
            name: {video for _, video, _ in read_ids(path)} if path else set() for name, path in lists.items()
        }
        if both := self.lists["dev"] & self.lists["test"]:
            raise DataError(
                f"{len(both)} videos in dev and in test, first {min(both)}",
                where=str(corpus.test_ids),
                fix="remove them from one list",
            )
        self.evaluation = read_openasl_evaluation(corpus.openasl)
        self.people = read_people(corpus.people)

    def video(self, video: str, sign_language: str, origin: str) -> Segment:
        """The fields that all segments of a listed video share, and the reason if the whole video is left out."""
        corpus = self.corpus
        code = sign_language or DEFAULT_SIGN_LANGUAGE
        reason = "no_video" if video not in self.files else ""
        reason = "other_sign_language" if corpus.sign_languages and code not in corpus.sign_languages else reason
        reason = "excluded_id" if video in self.lists["exclude"] else reason
        if reason != "other_sign_language" and not corpus.languages and code not in self.spoken:
            raise DataError(
                f"no caption language is known for the sign language {code!r}",
                where=origin,
                fix="add it to a spoken_languages tsv, add --languages en,..., or select with --sign-languages ase,...",
            )
        return Segment(
            corpus=corpus.name,
            id=video,
            split=next((split for split in ("dev", "test") if video in self.lists[split]), "train"),
            text="",
            media=VideoFile(self.files.get(video, corpus.videos / f"{video}.mp4")),
            language=self.caption_languages(code)[0],
            sign_language=code,
            origin=origin,
            excluded=reason,
        )

    def unknown(self, video: str, origin: str) -> Segment:
        """A row of the table whose video is not in the list."""
        media = VideoFile(self.corpus.videos / f"{video}.mp4")
        return Segment(self.corpus.name, video, "train", "", media, origin=origin, excluded="unknown_id")

    def caption_languages(self, sign_language: str) -> list[str]:
        """The languages a video's captions may have, the preferred first."""
        return self.corpus.languages or self.spoken.get(sign_language, [""])

    def check_listed(self, listed: dict[str, Segment]) -> None:
        """Refuse evaluation videos that are not in the list of ids."""
        for split, path in (("dev", self.corpus.dev_ids), ("test", self.corpus.test_ids)):
            if unlisted := self.lists[split] - listed.keys():
                raise DataError(
                    f"{len(unlisted)} of {len(self.lists[split])} {split} videos are not in {self.corpus.ids.name}, "
                    f"first {min(unlisted)}",
                    where=str(path),
                    fix="use lists of the same corpus",
                )

    def segment(self, base: Segment, caption: Caption, segment_id: str, origin: str) -> Segment:
        """One caption of a video, with the reason if it is left out."""
        corpus = self.corpus
        reason = base.excluded
        times = self.evaluation.get(base.id, [])
        if not reason and any(caption.start_seconds < end and start < caption.end_seconds for start, end in times):
            reason = "in_openasl_evaluation"
        base = dataclasses.replace(base, id=segment_id, origin=origin, excluded=reason)
        limits = (corpus.min_seconds, corpus.max_seconds)
        segment = caption_segment(base, caption, limits, corpus.max_characters, corpus.sounds)
        if self.people is None or segment.excluded:
            return segment
        count = self.people.get(segment_id)
        reason = "" if count == 1 else "people_unknown" if count is None else "not_one_person"
        return dataclasses.replace(segment, excluded=reason)


@dataclass(kw_only=True)
class YouTubeSL25(YouTubeASL):
    """Segments of YouTube-SL-25: more than 25 sign languages; ``ids`` is ``youtube-sl-25-metadata.csv``."""

    NAME = "youtube_sl25"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.published = {}
