"""Texts of finished shard sets and text files, in bounded blocks, to compare corpora with."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.corpora.rows import DELIMITERS
from shards.corpora.text_documents import SUFFIXES, fields_of, read_documents
from shards.corpora.text_files import Formats
from shards.errors import DataError, OptionError
from shards.filter.shared_texts import TRAIN
from shards.filter.template_texts import Sentences
from shards.format.index import INDEX_NAME, MANIFEST_NAME, file_sha256
from shards.names import existing
from shards.storage.store import Folder, open_folder

_ROWS = 4096
_COLUMNS = ["split", "text", "corpus", "sample_id"]


@dataclass(frozen=True, slots=True)
class Block:
    """Texts of one split with the place of each."""

    split: str
    texts: list[str]
    origins: list[str]


def shard_set_texts(folder: Folder) -> Iterator[Block]:
    """The texts of a shard set from its index, split by split within each block.

    Raises DataError when there is no readable index.
    """
    try:
        with _index_stream(folder) as handle, pq.ParquetFile(handle) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=_COLUMNS):
                rows: dict[str, tuple[list[str], list[str]]] = {}
                for row in batch.to_pylist():
                    texts, origins = rows.setdefault(row["split"], ([], []))
                    texts.append(row["text"])
                    origins.append(f"{folder.location}: {row['corpus']}/{row['sample_id']}")
                for split, (texts, origins) in rows.items():
                    yield Block(split, texts, origins)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(
            f"unreadable index ({error})", where=folder.join(INDEX_NAME), fix="run `slt shards index DIR` to write it"
        ) from error


def set_sentences(folder: Folder) -> Sentences:
    """Finds the sentences inside the documents of a finished set."""
    options = _manifest(folder).get("options")
    return Sentences((options if isinstance(options, dict) else {}).get("templates", ()))


def evaluation_texts(location: str, train_too: bool = True, column: str = "text", advice: str = "") -> Iterator[Block]:
    """The evaluation texts at a location; ``split`` names location and split.

    Args:
        location: a shard set (all splits but train), or a text file.
        train_too: take train from a set that has no other split.
        column: field or column of the text, in files that have columns.
        advice: how a user of the caller chooses ``column``, for errors.

    Raises:
        DataError: the location is neither, or cannot be read.
        OptionError: a file without that column.
    """
    if _is_text_file(location):
        yield from _file_texts(existing(Path(location)), location, column, advice)
        return
    folder = open_folder(location)
    splits = _manifest(folder)["splits"]
    chosen = [split for split in splits if split != TRAIN] or [TRAIN] * train_too
    sentences = set_sentences(folder)
    for block in shard_set_texts(folder):
        if block.split in chosen:
            yield Block(f"{location} {block.split}", list(map(sentences.inner, block.texts)), block.origins)


def _file_texts(path: Path, name: str, column: str, advice: str) -> Iterator[Block]:
    try:
        _check_column(path, column, advice)
        texts: list[str] = []
        origins: list[str] = []
        for number, values in read_documents(path, [column]):
            texts.append(str(values[0] or ""))
            origins.append(f"{path}:{number}")
            if len(texts) == _ROWS:
                yield Block(name, texts, origins)
                texts, origins = [], []
        yield Block(name, texts, origins)
    except OptionError:
        raise
    except DataError as error:  # its fix may name options that only a corpus has
        raise DataError(
            error.what, where=error.where, fix="repair the file, or write its texts into a .txt file"
        ) from None


def _check_column(path: Path, column: str, advice: str) -> None:
    columns = fields_of(path)
    if columns is None or column in columns or column.partition(".")[0] in columns:
        return
    others = [suffix for suffix, mark in DELIMITERS.items() if len(columns) == 1 and mark in columns[0]]
    if others:
        fix = f"link it under a name that ends in {others[0]}: the suffix tells what separates fields"
        raise OptionError(f"its header is one field, {columns[0]!r}", where=str(path), fix=fix)
    known = ", ".join(map(repr, columns)) or "none"
    raise OptionError(f"no column {column!r}; there are {known}", where=str(path), fix=advice)


def identity(location: str) -> str:
    """A fingerprint or checksum that changes when the texts at a location change."""
    if _is_text_file(location):
        try:
            return file_sha256(existing(Path(location)))
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", where=location, fix="check the path") from None
    return str(_manifest(open_folder(location)).get("fingerprint"))


def _is_text_file(location: str) -> bool:
    return "://" not in location and not Path(location).is_dir() and Formats(SUFFIXES).known(Path(location))


def _index_stream(folder: Folder) -> io.BufferedIOBase:
    if folder.is_local:
        return folder.path(INDEX_NAME).open("rb")
    return io.BytesIO(folder.read(INDEX_NAME))


def _manifest(folder: Folder) -> dict[str, Any]:
    if not folder.exists(MANIFEST_NAME):
        fix = f"name a folder of shards, or a file that is {', '.join(SUFFIXES)}"
        raise DataError("neither a shard set nor a text file", where=folder.location, fix=fix)
    try:
        values = json.loads(folder.read(MANIFEST_NAME))
    except ValueError as error:
        raise DataError(f"unreadable manifest ({error})", where=folder.location, fix="build it again") from None
    if not isinstance(values, dict) or not isinstance(values.get("splits"), dict):
        raise DataError("the manifest names no splits", where=folder.location, fix="build it again")
    return values
