"""DailyMoth-70h (Rust et al., ACL 2024): one native signer of American Sign Language, news, 48,386 clips of 224 pixels.

    dailymoth-70h/manifests/{train,val,test}.tsv             NAME.mp4 <tab> duration <tab> caption, no header
    dailymoth-70h/unblurred_clips/videos/00000/NAME.mp4      in folders named by the first five characters
    dailymoth-70h/blurred_clips/videos/00000/NAME.mp4

ssvp_slt's ``download_dm70.sh`` fetches and unpacks it; CC BY-NC 4.0. The columns are those of ssvp_slt's manifests;
manifests of other corpora in that form (``video_name duration caption``, with or without a header) work as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from shards.corpora.rows import file_stem, first_existing, known_splits, read_lines
from shards.errors import DataError, OptionError
from shards.schema import Segment, VideoFile

_MANIFESTS = {"train": ("train",), "dev": ("val", "dev"), "test": ("test",)}
_DURATION = re.compile(r"[0-9]{1,7}(?:\.[0-9]+)?(?:e-?[0-9]{1,2})?")
_HEADER = ("video_name", "duration", "caption")


class DailyMoth:
    """Segments of DailyMoth-70h.

    Args:
        root: the unpacked ``dailymoth-70h`` folder.
        clips: ``unblurred`` or ``blurred`` faces.
        splits: which of train, dev, test; by default those that have a manifest.
    """

    NAME = "dailymoth"

    def __init__(self, root: Path, clips: str = "unblurred", splits: list[str] | None = None) -> None:
        self.name = self.NAME
        self.root = Path(root)
        if clips not in ("unblurred", "blurred"):
            raise OptionError(f"no such clips: {clips!r}", where="dailymoth clips", fix="use unblurred or blurred")
        base = self.root / f"{clips}_clips"
        self.videos = base if base.is_dir() and not (base / "videos").is_dir() else base / "videos"
        self.settings = {"clips": clips}
        self.manifests = {split: path for split in _MANIFESTS if (path := self._manifest(split)) is not None}
        if not self.manifests:
            looked = [f"{name}.tsv" for names in _MANIFESTS.values() for name in names]
            raise DataError(
                f"no manifest: looked for {', '.join(looked)}",
                where=str(self.root / "manifests"),
                fix="pass the unpacked dailymoth-70h folder as root",
            )
        self.splits = known_splits(splits, self.manifests, self.NAME)

    def _manifest(self, split: str) -> Path | None:
        paths = (self.root / "manifests" / f"{name}.tsv" for name in _MANIFESTS[split])
        return next((path for path in paths if path.is_file()), None)

    def segments(self) -> Iterator[Segment]:
        """Every row of the chosen manifests in file order, whether or not its clip is there."""
        for split in self.splits:
            path = self.manifests[split]
            for line, row in read_lines(path):
                cells = row.split("\t")
                if not row.strip() or (line == 1 and cells == list(_HEADER)):
                    continue
                yield self._segment(split, cells, f"{path}:{line}")

    def _segment(self, split: str, cells: list[str], origin: str) -> Segment:
        if len(cells) != len(_HEADER) or not _DURATION.fullmatch(cells[1]):
            raise DataError(
                f"not name, duration and caption separated by tabs: {cells[:3]}",
                where=origin,
                fix="use the published manifests, or corpus table for other columns",
            )
        stem = file_stem(PurePosixPath(cells[0]).stem if cells[0].endswith(".mp4") else cells[0], f"{origin} name")
        nested = self.videos / stem[:5] / f"{stem}.mp4"
        flat = self.videos / f"{stem}.mp4"
        return Segment(
            corpus=self.NAME,
            id=stem,
            split=split,
            text=cells[2].strip(),
            media=VideoFile(first_existing((flat, nested))),
            language="en",
            sign_language="ase",
            signer="daily_moth",
            origin=origin,
        )
