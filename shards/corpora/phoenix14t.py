"""RWTH-PHOENIX-Weather 2014T (Camgoz et al., CVPR 2018): German Sign Language weather forecasts, release v3 layout.

    PHOENIX-2014-T/annotations/manual/PHOENIX-2014-T.{train,dev,test}.corpus.csv
    PHOENIX-2014-T/features/fullFrame-210x260px/{train,dev,test}/<name>/imagesNNNN.png

The csv files are separated by ``|`` without quoting. Their ``video`` column says ``<name>/1/*.png`` while the frames
are in ``<name>/``; the folder that exists is used. Some folders hold a stray profiling file, which is ignored.

``labels`` takes text, gloss and signer from a derivative instead, with the frames of the official release:

* GFSLT-VLP's ``labels.{train,dev,test}``: texts as in the csv, other glosses in hundreds of rows, no signer;
* neccam/slt's ``phoenix14t.pami0.{train,dev,test}``: texts with `` .`` appended, which is removed again. Its features
  (``sign``, pickled tensors) are not read;
* SLRT's ``phoenix-2014t.{train,dev,test}``: texts as in the csv, other glosses in hundreds of rows, with signers.

Licence: CC BY-NC-SA 3.0. 32 of the 642 test sentences occur word for word in train.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import ClassVar

from shards.corpora.labels import chosen_files, find_label_files, read_label_file
from shards.corpora.rows import file_stem, first_existing, known_splits, read_table
from shards.errors import DataError
from shards.schema import FrameFolder, Segment

COLUMNS = ("name", "video", "start", "end", "speaker", "orth", "translation")
SPLITS = ("train", "dev", "test")
FPS = 25.0
_ANNOTATIONS, _FRAMES = "annotations/manual", "features/fullFrame-210x260px"
_LABEL_FILES = ("labels.{}", "phoenix14t.pami0.{}", "phoenix-2014t.{}")


class Phoenix14T:
    """Segments of PHOENIX-2014T.

    Args:
        root: the ``PHOENIX-2014-T-release-v3`` folder, its inner ``PHOENIX-2014-T``, or a folder with the csv files
            alone (annotations can then be read and counted, media is missing).
        splits: which of train, dev, test; each must have its annotation file. Default: those that have one.
        labels: folder with a derivative's label files, used instead of the csv files.
    """

    NAME = "phoenix14t"
    published: ClassVar[dict[str, int]] = {"train": 7096, "dev": 519, "test": 642}

    def __init__(self, root: Path, splits: list[str] | None = None, labels: Path | None = None) -> None:
        self.name = self.NAME
        self.root = Path(root)
        inner = self.root / "PHOENIX-2014-T"
        self.base = inner if inner.is_dir() else self.root
        self.labels = labels
        self.settings = {"annotations": "derivative" if labels else "official"}
        chosen = known_splits(splits, SPLITS, self.NAME)
        if labels is not None:
            self.files = chosen_files(find_label_files(labels, _LABEL_FILES), splits, labels)
        else:
            files = {split: self._table(split) for split in SPLITS}
            if not any(path.is_file() for path in files.values()):
                raise self._no_annotations()
            self.files = {split: files[split] for split in chosen if splits or files[split].is_file()}
        self.splits = list(self.files)

    def _table(self, split: str) -> Path:
        folders = (self.base / _ANNOTATIONS, self.base)
        chosen = next((folder for folder in folders if list(folder.glob("*.corpus.csv"))), folders[0])
        return chosen / f"PHOENIX-2014-T.{split}.corpus.csv"

    def _no_annotations(self) -> DataError:
        return DataError(
            f"no {_ANNOTATIONS}/PHOENIX-2014-T.train.corpus.csv below it",
            where=str(self.root),
            fix="pass the unpacked PHOENIX-2014-T-release-v3 folder as root",
        )

    def segments(self) -> Iterator[Segment]:
        """Every annotated row in file order, whether or not its frames exist."""
        for split, path in self.files.items():
            yield from self._from_labels(split, path) if self.labels else self._official(split, path)

    def _official(self, split: str, path: Path) -> Iterator[Segment]:
        for line, row in read_table(path, "|", quoting=False, needed=COLUMNS):
            where = f"{path}:{line}"
            listed = PurePosixPath(row["video"])
            if listed.is_absolute() or ".." in listed.parts or len(listed.parts) < 2 or "\0" in row["video"]:
                raise DataError(
                    f"the video column {row['video']!r} is not NAME/1/*.png", where=where, fix="use the official csv"
                )
            for part in listed.parts:
                file_stem(part, where)
            fields = {"id": row["name"], "text": row["translation"].strip(), "gloss": row["orth"].strip()}
            media = self._frames(split, listed.parent, listed.name)
            yield self._segment(split, fields | {"signer": row["speaker"]}, media, where)

    def _from_labels(self, split: str, path: Path) -> Iterator[Segment]:
        for label in read_label_file(path):
            fields = {"id": label.name, "text": label.text.removesuffix(" ."), "gloss": label.gloss}
            media = self._frames(split, PurePosixPath(label.name, "1"), "*.png")
            yield self._segment(split, fields | {"signer": label.signer}, media, label.where)

    def _frames(self, split: str, listed: PurePosixPath, pattern: str) -> FrameFolder:
        frames = self.base / _FRAMES / split
        return FrameFolder(first_existing((frames / listed, frames / listed.parts[0])), pattern, FPS)

    def _segment(self, split: str, fields: dict[str, str], media: FrameFolder, where: str) -> Segment:
        return Segment(
            corpus=self.NAME,
            split=split,
            media=media,
            language="de",
            sign_language="gsg",
            origin=where,
            **fields,
        )
