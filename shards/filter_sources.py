"""Texts of finished shard sets and text files, in bounded blocks: what corpora are compared with."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.corpora.text_documents import SUFFIXES, read_documents
from shards.corpora.text_files import Formats
from shards.errors import DataError
from shards.index import INDEX_NAME, MANIFEST_NAME, file_sha256
from shards.store import Folder, open_folder

TRAIN = "train"
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


def evaluation_texts(location: str, train_too: bool = True) -> Iterator[Block]:
    """The evaluation texts at a location; ``split`` names location and split.

    Args:
        location: a shard set (all splits but train), or a text file.
        train_too: of a set that has no other split take train.

    Raises:
        DataError: there is neither, or it holds no texts.
    """
    if _is_text_file(location):
        path = Path(location)
        texts: list[str] = []
        origins: list[str] = []
        for number, values in read_documents(path, ["text"]):
            texts.append(str(values[0] or ""))
            origins.append(f"{path}:{number}")
            if len(texts) == _ROWS:
                yield Block(location, texts, origins)
                texts, origins = [], []
        yield Block(location, texts, origins)
        return
    folder = open_folder(location)
    splits = _manifest(folder)["splits"]
    wanted = [split for split in splits if split != TRAIN] or [TRAIN] * train_too
    for block in shard_set_texts(folder):
        if block.split in wanted:
            yield Block(f"{location} {block.split}", block.texts, block.origins)


def identity(location: str) -> str:
    """What tells whether the texts at a location have changed: a fingerprint or checksum."""
    if _is_text_file(location):
        try:
            return file_sha256(Path(location))
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
        raise DataError("neither a shard set nor a text file", where=folder.location, fix="name a folder of shards")
    try:
        values = json.loads(folder.read(MANIFEST_NAME))
    except ValueError as error:
        raise DataError(f"unreadable manifest ({error})", where=folder.location, fix="build it again") from None
    if not isinstance(values, dict) or not isinstance(values.get("splits"), dict):
        raise DataError("the manifest names no splits", where=folder.location, fix="build it again")
    return values
