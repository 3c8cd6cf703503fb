"""How2Sign (Duarte et al., CVPR 2021): American Sign Language instructions, translated into English.

    how2sign_realigned_{train,val,test}.csv    in root, or where the download script puts them:
                                               sentence_level/<split>/text/en/raw_text/re_aligned/
    raw_videos/<VIDEO_NAME>.mp4                whole green screen videos, frontal view; also <split>_raw_videos/,
                                               <split>/raw_videos/ or video_level/<split>/rgb_front/raw_videos/

The csv files are separated by tabs and have seven columns: VIDEO_ID, VIDEO_NAME, SENTENCE_ID, SENTENCE_NAME,
START_REALIGNED, END_REALIGNED, SENTENCE. Ids may begin with ``-``; SENTENCE_ID repeats where two people signed the
same video, SENTENCE_NAME does not. Only fields that need it are quoted, as in csv; other quotes are plain text.

Segments are cut from the whole videos at the re-aligned times. The pre-cut clips of the release follow the original
times, which are often wrong: sentences and clips do not match, and results suffer. They are read only with
``clips=true``; so are the label files that name clips (``labels``, Uni-Sign's ``labels.{train,dev,test}``).

Licence: CC BY-NC 4.0.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from shards.corpora.labels import chosen_files, clip_path, find_label_files, read_label_file
from shards.corpora.rows import file_stem, first_existing, known_splits, read_table
from shards.corpora.table import seconds
from shards.errors import DataError
from shards.schema import Segment, VideoFile

logger = logging.getLogger(__name__)
SPLITS = {"train": "train", "dev": "val", "test": "test"}
"""Our split -> the release's word for it."""
_TABLES = ("sentence_level/{0}/text/en/raw_text/re_aligned", "sentence_level/{0}/text/en/raw_text", ".")
_VIDEOS = ("video_level/{0}/rgb_front/raw_videos", "{0}_raw_videos", "{0}/raw_videos", "raw_videos")
_CLIPS = ("sentence_level/{0}/rgb_front/raw_videos", "{0}_rgb_front_clips/raw_videos", "{0}/raw_videos", "raw_videos")
_SIGNER = re.compile(r"-(\d+)-rgb_(?:front|side)$")
_MISALIGNED = (
    "pre-cut clips follow the original times, which are often wrong; whole videos cut at the re-aligned times "
    "(clips=false) match their sentences"
)


class How2Sign:
    """Segments of How2Sign.

    Args:
        root: folder of the download.
        splits: which of train, dev, test; default: those with annotations.
        videos: folder of the videos (or clips), if it is not one of the usual ones.
        realigned: use the re-aligned annotations; false: ``how2sign_<split>.csv`` with the original START and END.
        clips: read the pre-cut clips ``<SENTENCE_NAME>.mp4`` instead of cutting whole videos.
        labels: folder with ``labels.{train,dev,test}`` (pickles that name clips) used instead of the csv files; needs
            ``clips``.
    """

    NAME = "how2sign"
    published: ClassVar[dict[str, int]] = {"train": 31047, "dev": 1739, "test": 2343}

    def __init__(
        self,
        root: Path,
        splits: list[str] | None = None,
        videos: Path | None = None,
        realigned: bool = True,
        clips: bool = False,
        labels: Path | None = None,
    ) -> None:
        self.name = self.NAME
        self.root, self.videos, self.labels = Path(root), videos, labels
        self.realigned, self.clips = realigned, clips
        if labels is not None and not clips:
            raise DataError(
                "label files hold no times, so whole videos cannot be cut by them",
                where="corpus how2sign: labels",
                fix="use the re-aligned csv files, or add --clips true and accept misaligned clips",
            )
        chosen = known_splits(splits, SPLITS, self.NAME)
        if labels is not None:
            self.files = chosen_files(find_label_files(labels, ("labels.{}",)), splits, labels)
        else:
            files = {split: self._file(split) for split in SPLITS}
            if not any(path.is_file() for path in files.values()):
                raise self._no_annotations()
            self.files = {split: files[split] for split in chosen if splits or files[split].is_file()}
        self.splits = list(self.files)
        self.settings = {"realigned": realigned, "clips": clips, "labels": labels is not None}
        self.notes = (_MISALIGNED,) if clips else ()
        if clips:
            logger.warning("how2sign: %s", _MISALIGNED)

    def _file(self, split: str) -> Path:
        name = f"how2sign_{'realigned_' if self.realigned else ''}{SPLITS[split]}.csv"
        return first_existing(self.root / folder.format(SPLITS[split]) / name for folder in _TABLES)

    def _no_annotations(self) -> DataError:
        fix = "download 'English Translation (manually re-aligned)' and put the csv files into root"
        if self.realigned and list(self.root.rglob("how2sign_train.csv")):
            fix += "; with realigned=false the original annotations found there are used, which fit badly"
        name = "how2sign_realigned_train.csv" if self.realigned else "how2sign_train.csv"
        return DataError(f"no {name} below it", where=str(self.root), fix=fix)

    def segments(self) -> Iterator[Segment]:
        """Every annotated row in file order, whether or not its video exists."""
        for split, path in self.files.items():
            folder = self._folder(split)
            yield from self._from_labels(split, path, folder) if self.labels else self._from_table(split, path, folder)

    def _folder(self, split: str) -> Path:
        usual = _CLIPS if self.clips else _VIDEOS
        return self.videos or first_existing(self.root / folder.format(SPLITS[split]) for folder in usual)

    def _from_table(self, split: str, path: Path, folder: Path) -> Iterator[Segment]:
        times = ("START_REALIGNED", "END_REALIGNED") if self.realigned else ("START", "END")
        needed = ("VIDEO_NAME", "SENTENCE_NAME", "SENTENCE", *times)
        for line, row in read_table(path, "\t", quoting=False, needed=needed):
            where = f"{path}:{line}"
            start, end = (seconds(row[name].strip(), f"{where} {name}") for name in times)
            if start is None or end is None:
                raise DataError("a time is empty", where=where, fix="use the official csv")
            sentence = file_stem(row["SENTENCE_NAME"], where)
            video = VideoFile(folder / f"{file_stem(row['VIDEO_NAME'], where)}.mp4", start, end)
            media = VideoFile(folder / f"{sentence}.mp4") if self.clips else video
            excluded = "" if end > start or self.clips else "no_duration"
            yield self._segment(split, sentence, _unquoted(row["SENTENCE"]), media, where, excluded)

    def _from_labels(self, split: str, path: Path, folder: Path) -> Iterator[Segment]:
        for label in read_label_file(path):
            media = VideoFile(clip_path(folder, label.media))
            yield self._segment(split, label.name, label.text, media, label.where)

    def _segment(self, split: str, name: str, text: str, media: VideoFile, where: str, excluded: str = "") -> Segment:
        signer = _SIGNER.search(name)
        return Segment(
            corpus=self.NAME,
            id=name,
            split=split,
            text=text,
            media=media,
            language="en",
            sign_language="ase",
            signer=signer.group(1) if signer else "",
            origin=where,
            excluded=excluded,
        )


def _unquoted(field: str) -> str:
    """The text of a field quoted as in csv; a field with a quote at one end only stays as it is."""
    text = field.strip()
    inner = text[1:-1]
    quoted = len(text) >= 2 and text[0] == text[-1] == '"' and '"' not in inner.replace('""', "")
    return (inner.replace('""', '"') if quoted else text).strip()
