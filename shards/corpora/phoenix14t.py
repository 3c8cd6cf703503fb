"""RWTH-PHOENIX-Weather 2014T (Camgoz et al., CVPR 2018): German Sign Language weather forecasts, release v3 layout.

    PHOENIX-2014-T/annotations/manual/PHOENIX-2014-T.{train,dev,test}.corpus.csv
    PHOENIX-2014-T/features/fullFrame-210x260px/{train,dev,test}/<name>/imagesNNNN.png

The csv files are separated by ``|`` without quoting. Their ``video`` column says ``<name>/1/*.png`` while the frames
lie in ``<name>/``; whichever folder exists is used. Some folders hold a stray profiling file, which is no image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from shards.corpora.rows import read_table
from shards.errors import DataError
from shards.schema import FrameFolder, Segment

COLUMNS = ("name", "video", "start", "end", "speaker", "orth", "translation")
SPLITS = ("train", "dev", "test")
FPS = 25.0
_ANNOTATIONS, _FRAMES = "annotations/manual", "features/fullFrame-210x260px"


class Phoenix14T:
    """Segments of PHOENIX-2014T.

    Args:
        root: the ``PHOENIX-2014-T-release-v3`` folder, its inner ``PHOENIX-2014-T``, or a folder with the csv files
            alone (annotations can then be read and counted, media is missing).
        splits: which of train, dev, test; each must have its csv file.
    """

    NAME = "phoenix14t"

    def __init__(self, root: Path, splits: list[str] | None = None) -> None:
        self.name = self.NAME
        self.root = Path(root)
        inner = self.root / "PHOENIX-2014-T"
        self.base = inner if inner.is_dir() else self.root
        self.annotations = next(
            (folder for folder in (self.base / _ANNOTATIONS, self.base) if list(folder.glob("*.corpus.csv"))), None
        )
        if self.annotations is None:
            raise DataError(
                f"no {_ANNOTATIONS}/PHOENIX-2014-T.train.corpus.csv below it",
                where=str(self.root),
                fix="pass the unpacked PHOENIX-2014-T-release-v3 folder as root",
            )
        unknown = sorted(set(splits or []) - set(SPLITS))
        if unknown:
            raise DataError(f"unknown split {unknown}", where="phoenix14t splits", fix=f"choose from {list(SPLITS)}")
        present = [split for split in SPLITS if self._table(split).is_file()]
        self.splits = splits or present

    def _table(self, split: str) -> Path:
        assert self.annotations is not None
        return self.annotations / f"PHOENIX-2014-T.{split}.corpus.csv"

    def segments(self) -> Iterator[Segment]:
        """Every annotated row in file order, whether or not its frames exist."""
        for split in self.splits:
            path = self._table(split)
            for line, row in read_table(path, "|", quoting=False, needed=COLUMNS):
                yield Segment(
                    corpus=self.NAME,
                    id=row["name"],
                    split=split,
                    text=row["translation"].strip(),
                    media=self._frames(split, row["video"], f"{path}:{line}"),
                    language="de",
                    sign_language="gsg",
                    signer=row["speaker"],
                    gloss=row["orth"].strip(),
                    origin=f"{path}:{line}",
                )

    def _frames(self, split: str, video: str, origin: str) -> FrameFolder:
        given = PurePosixPath(video)
        if given.is_absolute() or ".." in given.parts or len(given.parts) < 2:
            raise DataError(f"the video column {video!r} is not NAME/1/*.png", where=origin, fix="use the official csv")
        frames = self.base / _FRAMES / split
        listed = frames / given.parent
        folder = listed if listed.is_dir() else frames / given.parts[0]
        return FrameFolder(folder, given.name, FPS)
