"""WLASL (Li et al., WACV 2020): isolated signs of American Sign Language; the text is the gloss.

    WLASL_v0.3.json             [{gloss, instances: [{video_id, split, signer_id, frame_start, frame_end, url, ...}]}]
    videos/<video_id>.mp4       one sign each, as the release's preprocess.py makes them (``clips=true``, the default)
    raw_videos_mp4/<name>.mp4   whole videos (``clips=false``): named by YouTube id, or by video_id from other sites

Frame numbers count from 1 at 25 frames per second, whatever the video's own rate; ``frame_end`` -1 means to the end.
They become times: frame 1 begins at 0 s. The boxes are in pixels of a picture size that the file does not give, so
they are not used. Meant for contrastive warm-up: single words teach no grammar.

``labels`` takes video, split and gloss from Uni-Sign's ``labels-2000.{train,dev,test}`` instead (``labels-100`` with
``glosses=100``, and so on), which name clips and no signers.

Many links are dead: up to 70 % may be missing before a build fails. Licence: C-UDA, research only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from shards.corpora.labels import Label, chosen_files, clip_path, find_label_files, read_label_file
from shards.corpora.records import read_json_array
from shards.corpora.rows import file_stem, known_splits, number_field, text_field
from shards.errors import DataError, OptionError
from shards.schema import Segment, VideoFile
from shards.wording import first_few

SPLITS = {"train": "train", "val": "dev", "test": "test"}
FPS = 25.0
_NEEDED = ("video_id", "split", "signer_id", "frame_start", "frame_end", "url")
_JSON = "WLASL_v0.3.json"
_YOUTUBE_ID = 11  # characters


class Wlasl:
    """Segments of WLASL.

    Args:
        root: folder with ``WLASL_v0.3.json``.
        splits: which of train, dev, test; all by default.
        videos: folder of the videos; default ``videos``, or ``raw_videos_mp4`` without ``clips``.
        clips: one video per sign, already cut; false: cut whole videos by frame numbers.
        glosses: how many glosses to take, from the first: 100, 300, 1000 and 2000 are the published subsets.
        labels: folder with Uni-Sign's label files, used instead of the json; needs ``clips``.
    """

    NAME = "wlasl"
    max_skipped_fraction = 0.7
    WHOLE: ClassVar[dict[str, int]] = {"train": 14289, "dev": 3916, "test": 2878}

    def __init__(
        self,
        root: Path,
        splits: list[str] | None = None,
        videos: Path | None = None,
        clips: bool = True,
        glosses: int = 2000,
        labels: Path | None = None,
    ) -> None:
        self.name = self.NAME
        self.root = Path(root)
        self.json = self.root / _JSON
        self.splits = known_splits(splits, SPLITS.values(), self.NAME)
        self.clips, self.glosses = clips, glosses
        self.videos = videos or self.root / ("videos" if clips else "raw_videos_mp4")
        self.published = self.WHOLE if glosses == 2000 else {}
        self.settings: dict[str, object] = {"clips": clips, "glosses": glosses}
        if glosses < 1:
            raise OptionError(f"glosses={glosses}", where="corpus wlasl", fix="take at least one, e.g. --glosses 2000")
        self.files: dict[str, Path] = {}
        if labels is not None:
            self._use_labels(labels, splits)
        elif not self.json.is_file():
            raise self._no_json()

    def _use_labels(self, folder: Path, splits: list[str] | None) -> None:
        if not self.clips:
            raise OptionError(
                "label files name clips, not whole videos",
                where="corpus wlasl: labels",
                fix=f"add --clips true, or leave labels out to use {_JSON}",
            )
        self.files = chosen_files(
            find_label_files(folder, (f"labels-{self.glosses}.{{}}", "labels.{}")), splits, folder
        )
        self.splits, self.settings = list(self.files), {**self.settings, "annotations": "derivative"}

    def _no_json(self) -> DataError:
        names = sorted(path.name for path in self.root.glob("*.json"))
        others = f"; there is {first_few(names, 3)}" if names else ""
        return DataError(
            f"no {_JSON} in it{others}",
            where=str(self.root),
            fix="pass the folder start_kit of a clone of dxli94/WLASL, which holds it, as root",
        )

    def segments(self) -> Iterator[Segment]:
        """Every instance in file order, whether or not its video exists."""
        for split, file in self.files.items():
            for label in read_label_file(file):
                yield self._from_label(split, label)
        if not self.files:
            yield from self._official()

    def _from_label(self, split: str, label: Label) -> Segment:
        return Segment(
            corpus=self.NAME,
            id=label.name,
            split=split,
            text=label.text or label.gloss,
            media=VideoFile(clip_path(self.videos, label.media)),
            language="en",
            sign_language="ase",
            signer=label.signer,
            gloss=label.gloss or label.text,
            origin=label.where,
        )

    def _official(self) -> Iterator[Segment]:
        path = self.json
        for number, entry in read_json_array(path, ("gloss", "instances")):
            if number > self.glosses:
                return
            where = f"{path}:record {number}"
            gloss = text_field(entry, "gloss", where)
            if not isinstance(entry["instances"], list):
                raise DataError("instances is no list", where=where, fix="use the official file")
            for index, instance in enumerate(entry["instances"]):
                yield from self._segment(gloss, instance, f"{where} instance {index}")

    def _segment(self, gloss: str, instance: object, where: str) -> Iterator[Segment]:
        missing = [name for name in _NEEDED if not isinstance(instance, dict) or name not in instance]
        if missing or not isinstance(instance, dict):
            raise DataError(f"the instance lacks {', '.join(missing)}", where=where, fix="use the official file")
        if (split := text_field(instance, "split", where)) not in SPLITS:
            raise DataError(f"split {split!r}", where=where, fix=f"use one of {', '.join(SPLITS)}")
        if SPLITS[split] not in self.splits:
            return
        video_id = file_stem(instance["video_id"], where)
        media, excluded = self._media(instance, video_id, where)
        yield Segment(
            corpus=self.NAME,
            id=video_id,
            split=SPLITS[split],
            text=gloss,
            media=media,
            language="en",
            sign_language="ase",
            signer=signer_name(instance, where),
            gloss=gloss,
            origin=where,
            excluded=excluded,
        )

    def _media(self, instance: dict[str, object], video_id: str, where: str) -> tuple[VideoFile, str]:
        if self.clips:
            return VideoFile(self.videos / f"{video_id}.mp4"), ""
        url = text_field(instance, "url", where)
        stem = url[-_YOUTUBE_ID:] if "youtube" in url or "youtu.be" in url else video_id
        first, last = (number_field(instance, name, where) for name in ("frame_start", "frame_end"))
        start = (first - 1) / FPS if first > 1 else None
        end = last / FPS if last > 0 else None
        excluded = "no_duration" if end is not None and end <= (start or 0) else ""
        return VideoFile(self.videos / f"{file_stem(stem, where)}.mp4", start, end), excluded


def signer_name(entry: dict[str, object], where: str) -> str:
    """``signer_id`` as text; empty for -1, which means unknown."""
    number = number_field(entry, "signer_id", where)
    return "" if number < 0 else f"{number:.0f}"
