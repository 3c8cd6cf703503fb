"""Finding the files of a downloaded corpus by name, however its folders are nested."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from shards.errors import DataError
from shards.names import ByName, existing

NO_MEDIA = "(no media in the annotations)"
"""File name of a segment whose annotation has none."""
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".flv", ".3gp")
"""In order of preference if a video exists in several formats."""


def check_folder(path: Path, what: str) -> Path:
    """The folder ``path`` in its spelling on the disk. Raises DataError that says ``what`` should be in it."""
    folder = existing(path)
    if not folder.is_dir():
        raise DataError(f"no such folder; looked for {what} there", where=str(path), fix="correct the path")
    return folder


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder in sorted order; links to folders are followed, each folder is entered once."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot be listed ({error.strerror})", where=str(error.filename), fix="check the permissions")

    seen: set[tuple[int, int]] = set()
    for base, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(base)
        if (identity := (status.st_dev, status.st_ino)) in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders.sort()
        for name in sorted(names):
            yield Path(base, name)


def files_by_stem(folder: Path, suffixes: Collection[str]) -> ByName[Path]:
    """Name without suffix -> file, for all files below ``folder`` with one of the suffixes.

    If a name has several suffixes, the first of ``suffixes`` counts. Raises DataError if the same file name occurs
    twice: in two folders, or in two spellings.
    """
    order = {suffix: rank for rank, suffix in enumerate(suffixes)}
    files: ByName[Path] = ByName()
    for path in files_below(folder):
        if (rank := order.get(path.suffix.lower())) is None:
            continue
        known = files.get(path.stem)
        if known is not None and rank > order[known.suffix.lower()]:
            continue
        if known is not None and rank == order[known.suffix.lower()]:
            raise DataError(f"two files for {path.stem!r}: {known} and {path}", where=str(folder), fix="remove one")
        files[path.stem] = path
    return files
