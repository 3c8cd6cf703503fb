"""MS-ASL (Vaezi Joze and Koller, BMVC 2019): isolated signs of American Sign Language on YouTube; text = gloss.

    MSASL_{train,val,test}.json    [{url, start_time, end_time, label, clean_text | text, signer_id, box, ...}]
    videos/<youtube id>.mp4        whole videos, cut by time

``box`` is [y0, x0, y1, x1] in fractions of the picture, a square around the signer. One video holds many signs, so
ids are ``<split>/<number in the file>/<youtube id>``. Meant for contrastive warm-up: single words teach no grammar.

Many videos are gone: up to 80 % may be missing before a build fails. Licence: C-UDA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from shards.corpora.openasl import square_crop, unit_box
from shards.corpora.records import read_json_array
from shards.corpora.rows import file_stem, known_splits, number_field, text_field
from shards.corpora.wlasl import signer_name
from shards.errors import DataError
from shards.schema import Crop, Segment, VideoFile

SPLITS = {"train": "train", "dev": "val", "test": "test"}
"""Our split -> the release's word for it."""
_NEEDED = ("url", "start_time", "end_time", "label", "text", "signer_id")
_YOUTUBE = re.compile(r"(?:v=|youtu\.be/|embed/)([\w-]{11})")


class MsAsl:
    """Segments of MS-ASL.

    Args:
        root: folder with the ``MSASL_<split>.json`` files.
        splits: which of train, dev, test; default: those with a file.
        videos: folder of the videos; default ``videos`` in root.
        boxes: crop to the published boxes; false keeps the whole picture.
        classes: take the labels below this: 100, 200, 500 and 1000 are the published subsets.
    """

    NAME = "msasl"
    max_skipped_fraction = 0.8
    WHOLE: ClassVar[dict[str, int]] = {"train": 16054, "dev": 5287, "test": 4172}

    def __init__(
        self,
        root: Path,
        splits: list[str] | None = None,
        videos: Path | None = None,
        boxes: bool = True,
        classes: int = 1000,
    ) -> None:
        self.name = self.NAME
        self.root = Path(root)
        self.videos = videos or self.root / "videos"
        self.boxes, self.classes = boxes, classes
        files = {split: self.root / f"MSASL_{name}.json" for split, name in SPLITS.items()}
        if not any(path.is_file() for path in files.values()):
            raise DataError("no MSASL_train.json in it", where=str(self.root), fix="pass the unpacked MS-ASL folder")
        chosen = known_splits(splits, SPLITS, self.NAME)
        self.files = {split: files[split] for split in chosen if splits or files[split].is_file()}
        self.splits = list(self.files)
        self.published = self.WHOLE if classes == 1000 else {}
        self.settings = {"boxes": boxes, "classes": classes}

    def segments(self) -> Iterator[Segment]:
        """Every sign in file order, whether or not its video exists."""
        for split, path in self.files.items():
            for number, entry in read_json_array(path, (*_NEEDED, *(["box"] if self.boxes else []))):
                where = f"{path}:record {number}"
                if number_field(entry, "label", where) < self.classes:
                    yield self._segment(split, number, entry, where)

    def _segment(self, split: str, number: int, entry: dict[str, object], where: str) -> Segment:
        match = _YOUTUBE.search(text_field(entry, "url", where))
        if match is None:
            raise DataError(f"no YouTube id in {entry['url']!r}", where=where, fix="use the official file")
        video = file_stem(match.group(1), where)
        start, end = (number_field(entry, name, where) for name in ("start_time", "end_time"))
        crop = self._crop(entry, where)
        word = text_field(entry, "clean_text" if entry.get("clean_text") else "text", where)
        return Segment(
            corpus=self.NAME,
            id=f"{split}/{number:05d}/{video}",
            split=split,
            text=word,
            media=VideoFile(self.videos / f"{video}.mp4", max(0.0, start), end, crop),
            language="en",
            sign_language="ase",
            signer=signer_name(entry, where),
            gloss=word,
            origin=where,
            excluded="no_duration" if end <= max(0.0, start) else "no_box" if self.boxes and crop is None else "",
        )

    def _crop(self, entry: dict[str, object], where: str) -> Crop | None:
        if not self.boxes:
            return None
        box = unit_box(entry["box"], f"{where} box")
        return square_crop((box[1], box[0], box[3], box[2])) if box else None
