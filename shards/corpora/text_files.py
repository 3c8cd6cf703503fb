"""Which files a text corpus reads, in a fixed order: single files, globs and folders per split."""

from __future__ import annotations

import glob
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.corpora.compressed import COMPRESSIONS, plain_suffix
from shards.errors import DataError, OptionError
from shards.format.index import INDEX_NAME, MANIFEST_NAME, read_manifest
from shards.names import existing
from shards.schema import SPLIT_NAME
from shards.wording import first_few

_NAMED = 3
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of one split; ``label`` names it in ids, which therefore stay the same if the folder moves."""

    split: str
    label: str
    path: Path
    of_set: bool = False
    """The index of a shard set: only its rows of this split are read."""


@dataclass(frozen=True, slots=True)
class Formats:
    """The file names a corpus reads: suffixes (``""`` for none), each also compressed, or a pattern."""

    suffixes: Sequence[str]
    pattern: re.Pattern[str] | None = None

    def known(self, path: Path) -> bool:
        return plain_suffix(path) in self.suffixes or bool(self.pattern and self.pattern.search(path.name))

    def __str__(self) -> str:
        return ", ".join(suffix or "(no suffix)" for suffix in self.suffixes) + f"; also {', '.join(COMPRESSIONS)}"


def find_files(
    paths: Mapping[str, object], formats: Formats, where: str, notes: list[str] | None = None
) -> list[TextFile]:
    """The files of every split in order; those of a folder or glob sorted by name.

    Args:
        paths: split -> file, folder, glob (``dump/**/*.jsonl.gz``), or a list of them. Folders give their files of
            known formats, without hidden ones (``.`` or ``_`` in front). A shard set gives its index, of which only
            the rows of this split are read.
        formats: what the corpus reads.
        where: named in errors.
        notes: gets a line per folder that holds files of other types, with their number and some of their names.

    Raises:
        DataError: no such file, an unknown format, a bad split name, or two files of one name.
    """
    files: dict[tuple[str, str], TextFile] = {}
    for split, entries in paths.items():
        check_split(split, where)
        for entry in entries if isinstance(entries, list | tuple) else [entries]:
            of_set = _set_of(existing(Path(str(entry))), split, where)
            for label, path in of_set or _expand(str(entry), formats, where, notes):
                if not formats.known(path):
                    raise OptionError(f"{path}: unknown file type", where=where, fix=f"use {formats}")
                if (split, label) in files:
                    raise DataError(f"two {split} files named {label}", where=where, fix="rename one: ids use it")
                files[split, label] = TextFile(split, label, path, bool(of_set))
    return list(files.values())


def _set_of(folder: Path, split: str, where: str) -> list[tuple[str, Path]]:
    """The index of a shard set; empty for any other folder. Raises OptionError when the set lacks the split."""
    if not ((folder / MANIFEST_NAME).is_file() and (folder / INDEX_NAME).is_file()):
        return []
    splits = read_manifest(folder).splits
    if split not in splits:
        raise OptionError(
            f"the shard set {folder} has no split {split!r}; it has {', '.join(splits) or 'none'}",
            where=where,
            fix="a shard set gives a split its own samples: --paths train=SET takes those of train",
        )
    return [(folder.resolve().name, folder / INDEX_NAME)]


def check_split(split: str, where: str) -> None:
    """Raise OptionError unless ``split`` can name a split."""
    if not SPLIT_NAME.fullmatch(split):
        raise OptionError(f"split {split!r}", where=where, fix="use a plain lower-case word such as train or dev")


def _expand(entry: str, formats: Formats, where: str, notes: list[str] | None) -> list[tuple[str, Path]]:
    path = existing(Path(entry))
    if path.is_dir():
        files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
        shown = [name for name in files if not _hidden(name)]
        chosen = [name for name in shown if formats.known(name)]
        others = [name.as_posix() for name in shown if not formats.known(name)]
        if others and notes is not None:
            notes.append(f"{entry}: files of other types, not read ({len(others)}): {first_few(others, _NAMED)}")
        root = path
    elif _WILD.search(entry) and not path.exists():
        fixed = _WILD.split(entry, maxsplit=1)[0]
        above = fixed[: fixed.rfind("/") + 1]
        root = existing(Path(above))
        spellings = {unicodedata.normalize(form, entry[len(above) :]) for form in ("NFC", "NFD")}
        matches = {
            Path(match) for spelling in spellings for match in glob.glob(spelling, root_dir=root, recursive=True)
        }
        chosen = sorted(match for match in matches if (root / match).is_file())
    else:
        return [(path.name, path)]
    if not chosen:
        raise DataError(f"{entry} holds no text files", where=where, fix=f"it needs {formats}")
    return [(name.as_posix(), root / name) for name in chosen]


def _hidden(name: Path) -> bool:
    return any(part.startswith((".", "_")) for part in name.parts)
