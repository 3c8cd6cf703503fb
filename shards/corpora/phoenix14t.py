"""RWTH-PHOENIX-Weather 2014T (Camgoz et al., CVPR 2018): German Sign Language weather forecasts, release v3 layout.

    PHOENIX-2014-T/annotations/manual/PHOENIX-2014-T.{train,dev,test}.corpus.csv
    PHOENIX-2014-T/features/fullFrame-210x260px/{train,dev,test}/<name>/imagesNNNN.png

The csv files are separated by ``|`` without quoting. Their ``video`` column says ``<name>/1/*.png`` while the frames
lie in ``<name>/``; whichever folder exists is used. Some folders hold a stray profiling file, which is no image.

``labels`` takes text, gloss and signer from a derivative instead, with the frames of the official release:

* GFSLT-VLP's ``labels.{train,dev,test}``: texts as in the csv, other glosses in hundreds of rows, no signer;
* neccam/slt's ``phoenix14t.pami0.{train,dev,test}``: texts with `` .`` appended, which is removed again. Its features
  (``sign``, pickled tensors) are not read.

Licence: CC BY-NC-SA 3.0. 32 of the 642 test sentences occur word for word in train.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import ClassVar

from shards.corpora.rows import file_stem, first_existing, known_splits, read_table, text_field
from shards.corpora.unpickle import TENSOR_PARTS, read_labels
from shards.errors import DataError
from shards.schema import FrameFolder, Segment

COLUMNS = ("name", "video", "start", "end", "speaker", "orth", "translation")
SPLITS = ("train", "dev", "test")
FPS = 25.0
_ANNOTATIONS, _FRAMES = "annotations/manual", "features/fullFrame-210x260px"
_LABEL_FILES = ("labels.{}", "phoenix14t.pami0.{}")


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
        files = {split: self._label_file(split) if labels else self._table(split) for split in SPLITS}
        if not any(path.is_file() for path in files.values()):
            raise self._no_annotations()
        chosen = known_splits(splits, SPLITS, self.NAME)
        self.files = {split: files[split] for split in chosen if splits or files[split].is_file()}
        self.splits = list(self.files)

    def _table(self, split: str) -> Path:
        folders = (self.base / _ANNOTATIONS, self.base)
        found = next((folder for folder in folders if list(folder.glob("*.corpus.csv"))), folders[0])
        return found / f"PHOENIX-2014-T.{split}.corpus.csv"

    def _label_file(self, split: str) -> Path:
        assert self.labels is not None
        paths = [self.labels / name.format(split) for name in _LABEL_FILES]
        return first_existing(paths)

    def _no_annotations(self) -> DataError:
        if self.labels is not None:
            return DataError(
                f"holds none of {', '.join(name.format('train') for name in _LABEL_FILES)}",
                where=str(self.labels),
                fix="pass the folder with the label files as labels, or leave it out to use the official csv files",
            )
        return DataError(
            f"no {_ANNOTATIONS}/PHOENIX-2014-T.train.corpus.csv below it",
            where=str(self.root),
            fix="pass the unpacked PHOENIX-2014-T-release-v3 folder as root",
        )

    def segments(self) -> Iterator[Segment]:
        """Every annotated row in file order, whether or not its frames exist."""
        for split, path in self.files.items():
            yield from self._derived(split, path) if self.labels else self._official(split, path)

    def _official(self, split: str, path: Path) -> Iterator[Segment]:
        for line, row in read_table(path, "|", quoting=False, needed=COLUMNS):
            where = f"{path}:{line}"
            given = PurePosixPath(row["video"])
            if given.is_absolute() or ".." in given.parts or len(given.parts) < 2 or "\0" in row["video"]:
                raise DataError(
                    f"the video column {row['video']!r} is not NAME/1/*.png", where=where, fix="use the official csv"
                )
            for part in given.parts:
                file_stem(part, where)
            fields = {"id": row["name"], "text": row["translation"].strip(), "gloss": row["orth"].strip()}
            media = self._frames(split, given.parent, given.name)
            yield self._segment(split, fields | {"signer": row["speaker"]}, media, where)

    def _derived(self, split: str, path: Path) -> Iterator[Segment]:
        for where, entry in read_labels(path, ("name", "text", "gloss"), TENSOR_PARTS):
            name = file_stem(text_field(entry, "name", where).removeprefix(f"{split}/"), where)
            fields = {"id": name, "text": text_field(entry, "text", where).removesuffix(" .")}
            fields |= {key: text_field(entry, key, where) for key in ("gloss", "signer") if key in entry}
            yield self._segment(split, fields, self._frames(split, PurePosixPath(name, "1"), "*.png"), where)

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
