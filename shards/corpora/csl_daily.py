"""CSL-Daily (Zhou et al., CVPR 2021): Chinese Sign Language of daily life, translated into Chinese.

    sentence_label/csl2020ct_v2.pkl       {"info": [{name, label_gloss, label_word, label_char, signer, length, ...}]}
    sentence_label/video_map.txt          index|name|length|gloss|char|word|postag: read where the pkl is missing
    sentence_label/split_1.txt            name|split
    sentence/frames_512x512/<name>/*.jpg  official frames (also found as sentence_frames-512x512/frames_512x512)
    sentence-crop/<name>.mp4              the same as 30 fps video, in some copies

Two entries of the release are incomplete. ``S000005_P0004_T00`` is in the train split, but not annotated;
``S000007_P0003_T00`` is annotated, but in no split. Both are left out here (18,400 train samples, as in the
sltbaselines code); with ``unlisted_to_train`` the second replaces the first (18,401, as in Uni-Sign).

``labels`` takes text and gloss from a derivative instead, one file per split: ``labels.{train,dev,test}`` of Uni-Sign
(18,401 train samples) or sltbaselines, or SLRT's ``csl-daily.{train,dev,test}``. Blanks between words are removed.

USTC gives out the corpus on a signed request, for research only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from shards.corpora.labels import chosen_files, find_label_files, read_label_file
from shards.corpora.rows import file_stem, first_existing, known_splits, read_table, text_field
from shards.corpora.unpickle import safe_unpickle
from shards.errors import DataError
from shards.names import ByName
from shards.schema import FrameFolder, Segment, VideoFile

SPLITS = ("train", "dev", "test")
NOT_ANNOTATED, NOT_LISTED = "S000005_P0004_T00", "S000007_P0003_T00"
_FRAMES = ("sentence_frames-512x512/frames_512x512", "frames_512x512", "sentence/frames_512x512")
_LABEL_FILES = ("labels.{}", "csl-daily.{}")
_LABELS, _PICKLE, _MAP, _SPLIT = "sentence_label", "csl2020ct_v2.pkl", "video_map.txt", "split_1.txt"


class CslDaily:
    """Segments of CSL-Daily.

    Args:
        root: folder with ``sentence_label`` and ``sentence`` or ``sentence-crop``.
        splits: which of train, dev, test; all by default.
        clips: read ``sentence-crop/<name>.mp4`` instead of the frame folders.
        frames_fps: rate of the frame folders.
        unlisted_to_train: put the annotated, unlisted ``S000007_P0003_T00`` into train.
        labels: folder with a derivative's label files, used instead of ``sentence_label``.
    """

    NAME = "csl_daily"
    published: ClassVar[dict[str, int]] = {"train": 18401, "dev": 1077, "test": 1176}
    notes: tuple[str, ...] = (
        f"train: {NOT_ANNOTATED} is listed but not annotated, {NOT_LISTED} is annotated but not listed; "
        "18,400 samples, or 18,401 with unlisted_to_train=true",
    )

    def __init__(
        self,
        root: Path,
        splits: list[str] | None = None,
        clips: bool = False,
        frames_fps: float = 30.0,
        unlisted_to_train: bool = False,
        labels: Path | None = None,
    ) -> None:
        self.name = self.NAME
        self.root = Path(root)
        self.splits = known_splits(splits, SPLITS, self.NAME)
        self.clips, self.frames_fps, self.unlisted_to_train = clips, frames_fps, unlisted_to_train
        if frames_fps <= 0:
            raise DataError(f"frames_fps={frames_fps} is no rate", where="corpus csl_daily", fix="e.g. 30")
        self.labels = first_existing((self.root / _LABELS, self.root))
        self.frames = first_existing(self.root / folder for folder in _FRAMES)
        self.settings: dict[str, object] = {"unlisted_to_train": unlisted_to_train}
        self.files: dict[str, Path] = {}
        if labels is not None:
            self.files = chosen_files(find_label_files(labels, _LABEL_FILES), splits, labels)
            self.splits, self.settings, self.notes = list(self.files), {"annotations": "derivative"}, ()
            return
        if not any((self.labels / name).is_file() for name in (_PICKLE, _MAP)):
            raise DataError(
                f"no {_LABELS}/{_PICKLE} and no {_LABELS}/{_MAP} below it",
                where=str(self.root),
                fix="pass the folder that holds sentence_label as root",
            )

    def segments(self) -> Iterator[Segment]:
        """The entries of the split file in order, then the annotated entry missing from it; or the label files."""
        for split, file in self.files.items():
            for label in read_label_file(file):
                fields = ("".join(label.text.split()), label.gloss, label.where)
                yield from self._chosen(split, label.name, fields, "")
        if not self.files:
            yield from self._official()

    def _official(self) -> Iterator[Segment]:
        annotated = self._annotations()
        path = self.labels / _SPLIT
        if not path.is_file():
            raise DataError(
                f"no {_SPLIT} beside the annotations: it says which split a clip is of",
                where=str(self.labels),
                fix="fetch it from the release, or pass label files of another project with --labels FOLDER",
            )
        listed: ByName[str] = ByName()
        for line, row in read_table(path, "|", quoting=False, needed=("name", "split")):
            where, name = f"{path}:{line}", row["name"]
            if row["split"] not in SPLITS:
                raise DataError(f"split {row['split']!r}", where=where, fix=f"use one of {', '.join(SPLITS)}")
            if name in listed:
                raise DataError(f"{name} is listed twice, first at {listed[name]}", where=where, fix="remove one line")
            listed[name] = where
            excluded = "listed_not_annotated" if name == NOT_ANNOTATED and name not in annotated else ""
            # Any other name without annotation stays an empty text: a skip that counts against the build.
            yield from self._chosen(row["split"], name, annotated.get(name, ("", "", where)), excluded)
        if not any(name in annotated for name in listed):
            raise DataError(
                f"none of its {len(listed)} names is annotated", where=str(path), fix="take all files from one release"
            )
        for name, fields in annotated.items():
            if name not in listed:
                taken = self.unlisted_to_train and name == NOT_LISTED
                yield from self._chosen("train", name, fields, "" if taken else "annotated_not_listed")

    def _chosen(self, split: str, name: str, fields: tuple[str, str, str], excluded: str) -> Iterator[Segment]:
        if split not in self.splits:
            return
        text, gloss, where = fields
        file_stem(name, where)
        name_parts = name.split("_")
        yield Segment(
            corpus=self.NAME,
            id=name,
            split=split,
            text=text,
            media=VideoFile(self.root / "sentence-crop" / f"{name}.mp4")
            if self.clips
            else FrameFolder(self.frames / name, "*.jpg", self.frames_fps),
            language="zh",
            sign_language="csl",
            signer=name_parts[1] if len(name_parts) == 3 else "",
            gloss=gloss,
            origin=where,
            excluded=excluded,
        )

    def _annotations(self) -> ByName[tuple[str, str, str]]:
        """Name -> (text, gloss, where)."""
        annotations: ByName[tuple[str, str, str]] = ByName()
        for name, *fields, where in self._pickled() if (self.labels / _PICKLE).is_file() else self._mapped():
            if name in annotations:
                raise DataError(
                    f"{name} is annotated twice, first at {annotations[name][2]}",
                    where=where,
                    fix="remove one of the two",
                )
            annotations[name] = (fields[0], fields[1], where)
        return annotations

    def _pickled(self) -> Iterator[tuple[str, str, str, str]]:
        path = self.labels / _PICKLE
        content = safe_unpickle(path)
        entries = content.get("info") if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError("no list of annotations under 'info'", where=str(path), fix="use the official file")
        for number, entry in enumerate(entries):
            where = f"{path}:info[{number}]"
            needed = ("name", "label_word", "label_gloss")
            if not isinstance(entry, dict) or any(key not in entry for key in needed):
                raise DataError(f"the entry lacks one of {', '.join(needed)}", where=where, fix="use the official file")
            name, words, gloss = (text_field(entry, key, where) for key in needed)
            yield name, "".join(words.split()), gloss, where

    def _mapped(self) -> Iterator[tuple[str, str, str, str]]:
        path = self.labels / _MAP
        for line, row in read_table(path, "|", quoting=False, needed=("name", "gloss", "word")):
            yield row["name"], "".join(row["word"].split()), row["gloss"].strip(), f"{path}:{line}"
