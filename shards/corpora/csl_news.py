"""CSL-News (Li et al., Uni-Sign, ICLR 2025): Chinese Sign Language of news broadcasts, 1,985 hours, for pretraining.

    data/train/CSL_News_Labels.json       [{"video": NAME.mp4, "pose": NAME.pkl, "text": ...}], 722,711 entries
    archive_001.zip ... archive_436.zip   the videos; unpack them anywhere below one folder

From Hugging Face ``ZechengLi19/CSL-News``, CC BY-NC 4.0. Texts come from speech recognition. There are no splits:
everything is ``train``. The csv next to the labels repeats four videos with other texts; use the JSON file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from shards.corpora.media_files import VIDEO_SUFFIXES, check_folder, files_by_stem
from shards.corpora.records import read_json_array
from shards.corpora.rows import file_stem, text_field
from shards.errors import DataError
from shards.schema import Segment, VideoFile


class CslNews:
    """Segments of CSL-News.

    Args:
        labels: ``CSL_News_Labels.json``.
        videos: folder with the unpacked archives, nested or not. Archives you did not fetch count as missing media:
            allow them with ``--max-skipped-fraction``.
    """

    NAME = "csl_news"
    published: dict[str, int] = {"train": 722711}  # noqa: RUF012 - read only

    def __init__(self, labels: Path, videos: Path) -> None:
        self.name = self.NAME
        self.labels, self.videos = Path(labels), check_folder(Path(videos), "the unpacked mp4 files of the archives")
        if self.labels.suffix != ".json":
            raise DataError(
                f"not the JSON labels: {self.labels.name!r}", where=str(self.labels), fix="use CSL_News_Labels.json"
            )

    def segments(self) -> Iterator[Segment]:
        """Every entry in file order, whether or not its video is there."""
        files = files_by_stem(self.videos, VIDEO_SUFFIXES)
        for number, entry in read_json_array(self.labels, ("video", "text")):
            where = f"{self.labels}:record {number}"
            video = PurePosixPath(text_field(entry, "video", where))
            stem = file_stem(video.stem, where)
            yield Segment(
                corpus=self.NAME,
                id=stem,
                split="train",
                text=text_field(entry, "text", where),
                media=VideoFile(files.get(stem, self.videos / f"{stem}.mp4")),
                language="zh",
                sign_language="csl",
                origin=where,
            )
