"""OpenASL (Shi et al., EMNLP 2022): American Sign Language of news and blogs on YouTube, translated into English.

    data/openasl-v1.0.tsv    vid yid start end raw-text tokenized-text gloss split; tabs, quotes are plain text
    data/bbox-v1.0.json      vid -> [x0, y0, x1, y1], fractions of the picture; under 1 % are wrong
    raw-video/<yid>.mp4      whole videos, cut by time and cropped to a square around the box
    video-clip/<vid>.mp4     clips made by the release's own script (``clips=true``): cut and cropped already

``vid`` is ``<yid>-HH:MM:SS.mmm-HH:MM:SS.mmm``. People replace the colons in the names of clips by ``%`` (the release's
script), ``-`` or ``_``; all of these are read. Segments without a box are left out, as in that script. It pads squares
that leave the picture with black; here they end at the picture's edge.

``labels`` takes splits and texts from Uni-Sign's ``labels.{train,dev,test}`` instead of the tsv. Their names are
``vid`` in one of these spellings, so the times are known and whole videos can be cut by them as well.

Videos disappear from YouTube: a build fails only if more than half of the segments are missing.
Licence: CC BY-NC-ND 4.0. About one in ten dev and test sentences occurs word for word in train.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from shards.corpora.labels import Label, chosen_files, clip_path, find_label_files, read_label_file
from shards.corpora.rows import file_stem, first_existing, known_splits, read_json, read_table
from shards.corpora.table import seconds
from shards.errors import DataError, OptionError
from shards.names import ByName, same_name
from shards.schema import Crop, Segment, VideoFile

SPLITS = ("train", "dev", "test")
COLUMNS = ("vid", "yid", "start", "end", "raw-text", "tokenized-text", "gloss", "split")
TEXTS = ("raw-text", "tokenized-text")
_TABLE, _BOXES = "openasl-v1.0.tsv", "bbox-v1.0.json"
_SPLIT_NAMES = {"val": "dev", "valid": "dev"}
_COLON_MARKS = (":", "%", "-", "_")
_CLOCK = r"([0-9]{2})[:%_-]([0-9]{2})[:%_-]([0-9]{2}\.[0-9]{1,6})"
_VID = re.compile(rf"(.+)-{_CLOCK}-{_CLOCK}")

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of the picture."""


class OpenAsl:
    """Segments of OpenASL.

    Args:
        root: folder with ``data`` (or the tsv itself) and ``raw-video``.
        splits: which of train, dev, test; all by default.
        videos: folder of the videos or clips; default ``raw-video``, or ``video-clip`` with ``clips``.
        clips: videos are named by ``vid``, cut and cropped already.
        boxes: crop to the published boxes; false keeps the whole picture.
        text: ``raw-text`` or ``tokenized-text``.
        labels: folder with Uni-Sign's label files, used instead of the tsv.
    """

    NAME = "openasl"
    published: ClassVar[dict[str, int]] = {"train": 96474, "dev": 967, "test": 976}
    max_skipped_fraction = 0.5

    def __init__(
        self,
        root: Path,
        splits: list[str] | None = None,
        videos: Path | None = None,
        clips: bool = False,
        boxes: bool = True,
        text: str = "raw-text",
        labels: Path | None = None,
    ) -> None:
        self.name = self.NAME
        self.root = Path(root)
        self.splits = known_splits(splits, SPLITS, self.NAME)
        self.clips, self.boxes, self.text = clips, boxes and not clips, text
        self.videos = videos or self.root / ("video-clip" if clips else "raw-video")
        if text not in TEXTS:
            raise OptionError(f"no text column {text!r}", where="corpus openasl: text", fix=f"use {' or '.join(TEXTS)}")
        self.table = first_existing((self.root / _TABLE, self.root / "data" / _TABLE))
        self.box_file = first_existing((self.root / _BOXES, self.root / "data" / _BOXES))
        self.settings = {"clips": clips, "boxes": self.boxes, "text": text}
        self.files: dict[str, Path] = {}
        if labels is not None:
            self.files = chosen_files(find_label_files(labels, ("labels.{}",)), splits, labels)
            self.splits, self.settings = list(self.files), {**self.settings, "text": "labels"}
        elif not self.table.is_file():
            raise DataError(
                f"no data/{_TABLE} below it", where=str(self.root), fix="pass a clone of chevalierNoir/OpenASL as root"
            )
        if self.boxes and not self.box_file.is_file():
            raise DataError(
                f"no data/{_BOXES} below it",
                where=str(self.root),
                fix="fetch it, or add --boxes false for whole pictures",
            )

    def segments(self) -> Iterator[Segment]:
        """Every annotated row in file order, whether or not its video exists."""
        boxes = ByName(self._read_boxes().items()) if self.boxes else ByName()
        present = {same_name(path.name) for path in self.videos.glob("*.mp4")} if self.clips else set()
        for split, file in self.files.items():
            for label in read_label_file(file):
                yield self._from_label(split, label, boxes, present)
        for line, row in () if self.files else read_table(self.table, "\t", quoting=False, needed=COLUMNS):
            where = f"{self.table}:{line}"
            split = _SPLIT_NAMES.get(row["split"], row["split"])
            if split not in SPLITS:
                raise DataError(f"split {row['split']!r}", where=where, fix=f"use one of {', '.join(SPLITS)}")
            if split not in self.splits:
                continue
            media, excluded = self._media(row, where, boxes, present)
            fields = {"id": row["vid"], "text": row[self.text].strip(), "gloss": row["gloss"].strip()}
            yield self._segment(split, fields, media, where, excluded)

    def _from_label(self, split: str, label: Label, boxes: ByName[Box | None], present: set[str]) -> Segment:
        """A clip of a label file; its name gives video and times."""
        fields = {"id": label.name, "text": label.text, "gloss": label.gloss}
        if (match := _VID.fullmatch(label.name)) is None:
            if not self.clips:
                raise DataError(
                    f"the name {label.name!r} tells no times, so whole videos cannot be cut by it",
                    where=label.where,
                    fix="add --clips true and --videos FOLDER with the clips",
                )
            return self._segment(split, fields, VideoFile(clip_path(self.videos, label.media)), label.where, "")
        yid, *marks = match.groups()
        start, end = ":".join(marks[:3]), ":".join(marks[3:])
        row = {"vid": f"{yid}-{start}-{end}", "yid": yid, "start": start, "end": end}
        if self.clips and (named := clip_path(self.videos, label.media)).is_file():
            return self._segment(split, fields | {"id": row["vid"]}, VideoFile(named), label.where, "")
        media, excluded = self._media(row, label.where, boxes, present)
        return self._segment(split, fields | {"id": row["vid"]}, media, label.where, excluded)

    def _segment(self, split: str, fields: dict[str, str], media: VideoFile, where: str, excluded: str) -> Segment:
        return Segment(
            corpus=self.NAME,
            split=split,
            media=media,
            language="en",
            sign_language="ase",
            origin=where,
            excluded=excluded,
            **fields,
        )

    def _media(
        self, row: dict[str, str], where: str, boxes: ByName[Box | None], present: set[str]
    ) -> tuple[VideoFile, str]:
        """The video, and why a segment is left out."""
        vid, yid = (file_stem(row[name], where) for name in ("vid", "yid"))
        if self.clips:
            names = [f"{vid.replace(':', mark)}.mp4" for mark in _COLON_MARKS]
            return VideoFile(self.videos / next((name for name in names if same_name(name) in present), names[0])), ""
        start, end = (seconds(row[name], f"{where} {name}") for name in ("start", "end"))
        if start is None or end is None or end <= start:
            return VideoFile(self.videos / f"{yid}.mp4"), "no_duration"
        crop = square_crop(boxes.get(vid))
        return VideoFile(self.videos / f"{yid}.mp4", start, end, crop), "no_box" if self.boxes and crop is None else ""

    def _read_boxes(self) -> dict[str, Box | None]:
        """vid -> left, top, right, bottom inside the picture; None for a box without area."""
        boxes = read_json(self.box_file)
        if not isinstance(boxes, dict):
            raise DataError(
                f"a {type(boxes).__name__}, not boxes by vid", where=str(self.box_file), fix="fetch the file again"
            )
        return {vid: unit_box(box, f"{self.box_file}: {vid}") for vid, box in boxes.items()}


def square_crop(box: Box | None) -> Crop | None:
    """The square around a box of left, top, right, bottom; None for no box."""
    if box is None:
        return None
    left, top, right, bottom = box
    return Crop(left, top, right, bottom, square=True)


def unit_box(box: object, where: str) -> Box | None:
    """Two corners as four fractions, clamped to the picture; None without area; DataError for anything else."""
    values = box if isinstance(box, list) else []
    if len(values) != 4 or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise DataError(
            f"{box!r} are not four fractions", where=where, fix="fetch the file again, or add --boxes false"
        )
    left, top, right, bottom = (min(1.0, max(0.0, float(value))) for value in values)
    return (left, top, right, bottom) if right > left and bottom > top else None
