"""Label files of other projects: one pickle per split, which names clips and has no times.

GFSLT-VLP, sltbaselines and Uni-Sign publish ``labels.<split>`` (dicts by name); neccam/slt and SLRT publish lists under
other names. Each entry has ``name`` and ``text``, most have ``gloss`` (text, or a list of words), some ``signer`` or
``video_path``. They are read as data, see :mod:`shards.corpora.unpickle`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shards.corpora.rows import file_stem, first_existing, text_field
from shards.corpora.unpickle import TENSOR_PARTS, read_labels
from shards.errors import DataError

SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "val"), "test": ("test",)}
"""Our split -> the ends of the files' names."""
_SPLIT_FOLDERS = frozenset(("train", "dev", "val", "test"))


@dataclass(frozen=True, slots=True)
class Label:
    """What a label file says about one clip."""

    where: str
    name: str
    """Without folder and ``.mp4``; can name a file."""
    text: str
    gloss: str
    signer: str
    media: PurePosixPath
    """The clip, relative to the folder of all clips."""


def find_label_files(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Split -> its label file in ``folder``, for the splits that have one.

    Args:
        patterns: file names with ``{}`` for the split (``labels.{}``), in order of preference.

    Raises:
        DataError: there is none.
    """
    files = {}
    for split, ends in SPLIT_NAMES.items():
        candidates = [folder / pattern.format(end) for pattern in patterns for end in ends]
        if path := next((path for path in candidates if path.is_file()), None):
            files[split] = path
    if not files:
        looked = [pattern.format("train") for pattern in patterns]
        raise DataError(
            f"holds {'none of' if len(looked) > 1 else 'no'} {', '.join(looked)} (nor dev, val or test)",
            where=str(folder),
            fix="pass the folder with the label files, or leave `labels` out to use the official annotations",
        )
    return files


def chosen_files(files: Mapping[str, Path], splits: Sequence[str] | None, folder: Path) -> dict[str, Path]:
    """The files of the chosen splits, of all by default. Raises DataError for a split without one."""
    if missing := [split for split in splits or () if split not in files]:
        raise DataError(
            f"no label file for {', '.join(missing)}; there are {', '.join(path.name for path in files.values())}",
            where=str(folder),
            fix=f"fetch it, or choose --splits {','.join(files)}",
        )
    return {split: files[split] for split in splits or files}


def read_label_file(path: Path) -> Iterator[Label]:
    """The entries of a label file in its order. Raises DataError for a file or entry that cannot be used."""
    for where, entry in read_labels(path, ("name", "text"), TENSOR_PARTS):
        path_or_name = text_field(entry, "name", where)
        split, slash, rest = path_or_name.partition("/")
        name = file_stem((rest if slash and split in _SPLIT_FOLDERS else path_or_name).removesuffix(".mp4"), where)
        text, gloss, signer = (_optional(entry, key, where) for key in ("text", "gloss", "signer"))
        yield Label(where, name, text, gloss, signer, _media(entry, name, where))


def _optional(entry: Mapping[str, object], key: str, where: str) -> str:
    return "" if entry.get(key) is None else text_field(entry, key, where)


def _media(entry: Mapping[str, object], name: str, where: str) -> PurePosixPath:
    """``video_path`` of an entry if it has one, else the name with ``.mp4``."""
    if not entry.get("video_path"):
        return PurePosixPath(f"{name}.mp4")
    path = PurePosixPath(text_field(entry, "video_path", where))
    for part in path.parts:
        file_stem(part, where)
    return path


def clip_path(folder: Path, media: PurePosixPath) -> Path:
    """Path of a clip: its own below ``folder``, or in ``folder`` itself."""
    return first_existing((folder / media, folder / media.name))
