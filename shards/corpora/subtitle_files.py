"""Matches subtitles to videos by their names."""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.corpora.media_files import VIDEO_SUFFIXES, files_below
from shards.errors import DataError, OptionError

FORMATS = (".eaf", ".vtt", ".srt", ".ttml", ".json3")
"""In order of preference if a track exists in several formats."""
_TRACK = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


@dataclass(frozen=True, slots=True)
class Video:
    """A video, its subtitles, or both."""

    name: str
    """Path below the folder without suffix; unique."""
    path: Path | None
    subtitles: Path | None


def match_subtitles(videos: Path, subtitles: Path, video_suffix: str, tracks: Sequence[str]) -> list[Video]:
    """The videos below one folder with their subtitles below another, ordered by name; and subtitles without a video.

    Args:
        videos: folder, nested or not.
        subtitles: folder; the same names below it, or flat.
        video_suffix: end of the videos' names that the names of their subtitles lack.
        tracks: names between a video's name and the suffix of its subtitles, preferred first; empty: the only track,
            whatever its name.

    Raises:
        DataError: no video at all, or two videos that a flat file may belong to.
        OptionError: several tracks and none chosen, the chosen ones are not there, or no video has this suffix.
    """
    video_files = _preferred(videos, VIDEO_SUFFIXES)
    if not video_files:
        looked = ", ".join(VIDEO_SUFFIXES)
        raise DataError(f"no video in it: looked for {looked}", where=str(videos), fix="pass the videos' folder")
    videos_by_name = {
        name.removesuffix(video_suffix): path for name, path in video_files.items() if name.endswith(video_suffix)
    }
    if not videos_by_name:
        raise OptionError(
            f"none of {len(video_files)} videos ends in {video_suffix!r}; the first is {min(video_files)!r}",
            where=str(videos),
            fix="correct --video-suffix",
        )
    of_video, alone = _assigned(videos_by_name, _preferred(subtitles, FORMATS), subtitles)
    pairs = [Video(name, path, _chosen(name, of_video[name], tracks)) for name, path in videos_by_name.items()]
    known = sorted({track for files in of_video.values() for track in files})
    if tracks and known and not set(tracks) & set(known):
        raise OptionError(
            f"no subtitles of the track {' or '.join(map(repr, tracks))}; there are {', '.join(map(repr, known))}",
            where=str(subtitles),
            fix="name tracks that are there: --tracks NAME,NAME",
        )
    return sorted([*pairs, *(Video(name, None, path) for name, path in alone.items())], key=lambda video: video.name)


def _preferred(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Path below ``folder`` without suffix -> file; of several, the one whose suffix comes first in ``suffixes``."""
    order = {suffix: rank for rank, suffix in enumerate(suffixes)}
    files: dict[str, Path] = {}
    for path in files_below(folder):
        suffix = path.suffix.lower()
        if suffix in order and not path.name.startswith("."):
            # the names of one download may be composed, those of another decomposed: č is one character or two
            name = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
            known = files.setdefault(name, path)
            if known is not path and known.suffix.lower() == suffix:
                raise DataError(f"two files for {name!r}: {known} and {path}", where=str(folder), fix="remove one")
            if order[suffix] < order[known.suffix.lower()]:
                files[name] = path
    return files


def _assigned(
    videos: dict[str, Path], subtitles: dict[str, Path], folder: Path
) -> tuple[dict[str, dict[str, Path]], dict[str, Path]]:
    """Video -> track -> file, and the files without a video by name."""
    by_base: dict[str, list[str]] = collections.defaultdict(list)
    for name in videos:
        by_base[name.rpartition("/")[2]].append(name)
    of_video: dict[str, dict[str, Path]] = collections.defaultdict(dict)
    alone: dict[str, Path] = {}
    for name, path in subtitles.items():
        parent, slash, base = name.rpartition("/")
        for stem, track in _possible_names(base):
            same_place = f"{parent}{slash}{stem}"
            places = [same_place] if same_place in videos else by_base.get(stem, [])
            if len(places) > 1:
                raise DataError(
                    f"{path.name} may belong to {places[0]} or {places[1]}",
                    where=str(folder),
                    fix="put the subtitles into the folders of their videos",
                )
            if places:
                of_video[places[0]].setdefault(track, path)
                break
        else:
            alone[name] = path
    return of_video, alone


def _possible_names(base: str) -> Iterator[tuple[str, str]]:
    """Every (name of the video, track) that a subtitle file's name may mean, the longest name first."""
    yield base, ""
    for mark in reversed([match.start() for match in re.finditer(r"[._]", base)]):
        if _TRACK.fullmatch(base[mark + 1 :].replace("_", "-").replace(".", "-")):
            yield base[:mark], base[mark + 1 :]


def _chosen(name: str, tracks: dict[str, Path], preferred: Iterable[str]) -> Path | None:
    if preferred:
        return next((tracks[track] for track in preferred if track in tracks), None)
    if len(tracks) > 1:
        shown = ", ".join(path.name for path in tracks.values())
        raise OptionError(
            f"{len(tracks)} tracks for one video: {shown}",
            where=name,
            fix=f"choose with --tracks, for example --tracks {max(tracks)}",
        )
    return next(iter(tracks.values()), None)
