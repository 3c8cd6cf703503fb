"""Finding the files of a downloaded corpus by name, however its folders are nested."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from shards.errors import DataError
from shards.names import ByName, existing

NO_MEDIA = "(no media in the annotations)"
"""Stands for the file name of a segment whose annotation names none."""
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".m4v", ".avi", ".flv", ".3gp")
"""In order of preference where the same video lies there twice."""


def check_folder(path: Path, what: str) -> Path:
    """The folder ``path``, in whatever spelling it is there. Raises DataError saying ``what`` was looked for."""
    found = existing(path)
    if not found.is_dir():
        raise DataError(f"no such folder; looked for {what} there", where=str(path), fix="correct the path")
    return found


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

    Where a name has several suffixes the one that stands first in ``suffixes`` counts. Raises DataError when the same
    file name occurs twice: in two folders, or in two spellings.
    """
    order = {suffix: rank for rank, suffix in enumerate(suffixes)}
    found: ByName[Path] = ByName()
    for path in files_below(folder):
        if (rank := order.get(path.suffix.lower())) is None:
            continue
        known = found.get(path.stem)
        if known is not None and rank > order[known.suffix.lower()]:
            continue
        if known is not None and rank == order[known.suffix.lower()]:
            raise DataError(f"two files for {path.stem!r}: {known} and {path}", where=str(folder), fix="remove one")
        found[path.stem] = path
    return found
