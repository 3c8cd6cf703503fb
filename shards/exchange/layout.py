"""Tars made elsewhere: which files of a folder are shards, which split their names mean, and ids that repeat across
tars."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from shards.errors import DataError, OptionError
from shards.format.index import INDEX_NAME, MANIFEST_NAME
from shards.schema import SPLIT_NAME
from shards.storage.store import Folder, is_remote, open_folder
from shards.wording import and_more

Note = Callable[[str], None]
"""Receives what a user should know about a result, other than errors."""

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "devel", "development", "val", "valid", "validation"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
    # this word means the dev set to some and the test set to others, so it stays a split of its own
    **dict.fromkeys(("eval", "evaluation"), "eval"),
}
"""Words for splits, and the names that the splits get."""

TEXT_FIELDS = ("text", "caption", "translation", "sentence")
"""Names that projects use for the text in a sample's json."""
VIDEO_KINDS = frozenset({"mp4", "mkv", "webm", "mov", "avi", "m4v"})
"""Last extensions of members that hold a video."""

_COMPRESSED = re.compile(r"\.(?:tar\.(?:gz|bz2|xz|zst|lz4|lzma|br|z)|tgz|tbz2?|txz|tzst|taz)$", re.IGNORECASE)
_WRITTEN_BY_US = frozenset({INDEX_NAME, MANIFEST_NAME, "skipped.jsonl", "report.json"})
_NAMED = 5


def is_one_tar(location: str) -> bool:
    """Whether a path or URL names one file rather than a folder."""
    return location.endswith(".tar") if is_remote(location) else Path(location).is_file()


def open_tars(
    location: Path | str, storage_options: Mapping[str, object] | None = None, on_note: Note | None = None
) -> tuple[Folder, list[str]]:
    """The folder at a path or URL and the sorted names of its tars; for the path of one tar, only that one.

    Args:
        location: folder, URL of a folder, or one tar.
        storage_options: see :func:`shards.storage.store.open_folder`.
        on_note: receives a note on other files in the folder.

    Raises:
        DataError: no such folder, no tars in it, or compressed ones.
    """
    text = str(location)
    if is_one_tar(text):
        parent, _, name = text.rpartition("/")
        _refuse_compressed([name], text)
        return open_folder(parent or ("/" if text.startswith("/") else "."), storage_options), [name]
    folder = open_folder(location, storage_options)
    if folder.is_local and not folder.path("").is_dir():
        raise DataError("no such file or folder", where=text, fix="check the path")
    files = folder.list()
    _refuse_compressed(files, text)
    tars = [name for name in files if name.endswith(".tar")]
    others = _others(folder, files, tars)
    shown = and_more(others, _NAMED)
    if not tars:
        raise DataError(
            "no *.tar files" + (f"; it holds {shown}" if others else ""),
            where=text,
            fix="pass the folder that holds the shards",
        )
    if others and on_note is not None:
        on_note(f"left out, only the *.tar files of the folder itself are read: {shown}")
    return folder, tars


def _refuse_compressed(names: list[str], where: str) -> None:
    if packed := [name for name in names if _COMPRESSED.search(name)]:
        raise DataError(
            f"{and_more(packed, 1)}: samples inside a compressed tar have no address",
            where=where,
            fix=f"decompress them (for .gz: gunzip {packed[0]}), or move them away",
        )


def _others(folder: Folder, files: list[str], tars: list[str]) -> list[str]:
    """Entries that are neither shards nor files of a shard set; local folders end in a slash."""
    if folder.is_local:
        files = [entry.name + "/" * entry.is_dir() for entry in folder.path("").iterdir()]
    known = {*tars, *_WRITTEN_BY_US}
    return sorted(name for name in files if name not in known and not name.startswith("."))


def folder_name(folder: Folder) -> str:
    """The last part of a folder's path or URL."""
    if folder.is_local:
        return folder.path("").absolute().name
    return folder.location.rstrip("/").rpartition("/")[2]


def name_splits(name: str) -> set[str]:
    """The splits named by whole words of a file name: ``{"test"}`` for ``phoenix-Test_0.tar``."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name.removesuffix(".tar"))
    return {SPLITS[word] for word in (word.lower().removesuffix("set") for word in words) if word in SPLITS}


class TarSplits:
    """The split of samples that do not name their own.

    Args:
        names: all tars of the set.
        folder: name of their folder; counts if no tar names a split and it is itself a word for one.
        given: the split of all tars, whatever their names.
        fallback: the split of tars whose name does not decide it.
        option: how a user sets the split, for errors and notes.

    Raises:
        OptionError: ``given`` is no name of a split.
    """

    def __init__(
        self, names: Iterable[str], folder: str, given: str = "", fallback: str = "", option: str = "--split NAME"
    ) -> None:
        if given and not SPLIT_NAME.fullmatch(given):
            raise OptionError(
                f"{given!r} cannot be a split", where="--split", fix="write a name such as train, dev, test"
            )
        self._splits_of = {name: name_splits(name) for name in names}
        self._named_example = next((name for name, splits in self._splits_of.items() if splits), "")
        self._folder = "" if self._named_example else SPLITS.get(folder.partition(".")[0].lower(), "")
        self._given, self._fallback, self._option = given, fallback, option
        self._from_folder = self._assumed = 0

    def of(self, tar: str) -> str:
        """The split of a sample in this tar ('' for a store without tars).

        Raises DataError if its name means several splits, or none while another tar's name means one.
        """
        splits = self._splits_of.get(tar, set())
        if self._given or (len(splits) != 1 and self._fallback):
            return self._given or self._fallback
        if len(splits) == 1:
            return next(iter(splits))
        if splits or self._named_example:
            problem = (
                f"speaks of {' and '.join(sorted(splits))}" if splits else f"names no split, {self._named_example} does"
            )
            fix = f"rename the tar (train-..., dev-..., test-...) or give {self._option}"
            raise DataError(f"which split is this? The name {problem}", where=tar, fix=fix)
        if self._folder:
            self._from_folder += 1
            return self._folder
        self._assumed += 1
        return "train"

    def tell(self, on_note: Note) -> None:
        """Note which splits were assumed."""
        if self._from_folder:
            on_note(f"{self._from_folder} samples are {self._folder}, for the folder is called so")
        if self._assumed:
            on_note(f"nothing names a split: {self._assumed} samples are train; for another give {self._option}")


def repeating(samples: Iterable[tuple[str, str, str]], on_note: Note) -> set[str]:
    """Corpora whose ids occur in several tars: their samples need the name of their tar (:func:`id_in_tar`).

    Args:
        samples: (tar, corpus, id), tar by tar.
        on_note: receives a note on every such corpus, with an example.

    Raises:
        DataError: an id that occurs twice within a tar.
    """
    last: dict[tuple[str, str], str] = {}
    examples: dict[str, str] = {}
    for tar, corpus, name in samples:
        before = last.get((corpus, name))
        if before == tar:
            raise DataError(f"the id {name!r} of {corpus} occurs twice in a tar", where=tar, fix="make its ids unique")
        if before is not None:
            examples.setdefault(corpus, f"{name!r} in {before} and {tar}")
        last[corpus, name] = tar
    for corpus, example in sorted(examples.items()):
        on_note(f"ids of {corpus} occur in several tars ({example}): every id begins with its tar's name now, TAR/ID")
    return set(examples)


def id_in_tar(tar: str, name: str) -> str:
    """An id that is unique across tars: ``a/000001``."""
    return f"{tar.removesuffix('.tar')}/{name}"
