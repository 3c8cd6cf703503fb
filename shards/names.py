"""Names that are written alike: ``č`` is one character (NFC) or two (NFD), by the system that wrote it.

A file copied from macOS may be called ``čerešňa.mp4`` in NFD while the annotations spell it in NFC. Every reader takes
both for the same name. What is stored keeps the form in which it was annotated.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from shards.errors import DataError
from shards.schema import FrameFolder, RowsFile, VideoFile

Value = TypeVar("Value")
Media = TypeVar("Media", bound=VideoFile | FrameFolder | RowsFile)


def same_name(name: str) -> str:
    """The form that all spellings of a name share."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class ByName(Mapping[str, Value]):
    """A mapping whose keys are names: it finds a value by any spelling, and lists the names as they were given.

    Of names that are the same the last one counts, as in a dict.
    """

    def __init__(self, pairs: Iterable[tuple[str, Value]] = ()) -> None:
        self._found: dict[str, tuple[str, Value]] = {}
        for name, value in pairs:
            self[name] = value

    def __setitem__(self, name: str, value: Value) -> None:
        self._found[same_name(name)] = name, value

    def __getitem__(self, name: str) -> Value:
        return self._found[same_name(name)][1]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._found.values())

    def __len__(self) -> int:
        return len(self._found)


def existing(path: Path) -> Path:
    """``path``; where only another spelling of its name or of a folder above it exists, that one.

    Raises:
        DataError: several other spellings exist.
    """
    if str(path).isascii() or path.exists():
        return path
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        if (found / part).exists():
            found /= part
            continue
        spellings = _spellings(str(found), _changed(found)).get(same_name(part), ())
        if len(spellings) > 1:
            raise DataError(
                f"{part!r} is there in {len(spellings)} other spellings of the same characters",
                where=str(found),
                fix="remove all but one",
            )
        if not spellings:
            return path
        found /= spellings[0]
    return found


def located(media: Media) -> Media:
    """``media`` with the path that :func:`existing` finds."""
    path = existing(media.path)
    return media if path == media.path else dataclasses.replace(media, path=path)


def _changed(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=8)
def _spellings(folder: str, changed: int) -> Mapping[str, tuple[str, ...]]:
    """Shared form -> names in a folder, for those that are not ASCII; ``changed``: the folder's time stamp."""
    found: dict[str, tuple[str, ...]] = {}
    try:
        names = [name for name in os.listdir(folder or ".") if not name.isascii()]
    except OSError:
        return found
    for name in sorted(names):
        found[same_name(name)] = (*found.get(same_name(name), ()), name)
    return found
