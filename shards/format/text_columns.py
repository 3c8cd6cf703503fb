"""Text columns: further texts of every sample, kept beside a shard set, whose shards and index stay as they are.

Several references or paraphrases, a pseudo-gloss, the sentences before, a pseudo-label with its confidence: each is a
column with a name of its own, one file per column::

    column-NAME.arrow    one row per sample of the set, in the order of its index

    texts    list of strings: what the column says of the sample, in order; empty where it says nothing
    scores   list of float32 beside the texts (confidences); empty where texts have none

It is an uncompressed Arrow file of one batch, so that every process of a host maps the same bytes and reads a row in
place: nothing is copied, parsed or opened per sample. The file names the shard set it belongs to (its fingerprint) and
has a fingerprint of its own, over the values alone, which becomes part of the order's identity where a run reads the
column (``PlanOptions.columns``). Any Arrow tool reads it: ``pyarrow.feather.read_table`` or pandas' ``read_feather``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.atomic import put_file
from shards.errors import DataError, OptionError
from shards.format.index import ShardSet
from shards.schema import text_hash

NAME = re.compile(r"[a-z][a-z0-9_]*")
_ABOUT = b"slt"


@dataclass(frozen=True)
class TextColumn:
    """An opened column: a view of its memory-mapped file, indexed by rows of the set's index."""

    name: str
    set_fingerprint: str
    fingerprint: str
    """sha256 over the values, whatever wrote the file."""
    about: Mapping[str, Any]
    """How it was made, as its writer said."""
    table: pa.RecordBatch

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def texts(self, row: int) -> list[str]:
        """The texts of one row, possibly none."""
        found: list[str] = self.table.column(0)[row].as_py()
        return found

    def counts(self) -> NDArray[np.int64]:
        """[rows] how many texts each row has."""
        offsets: NDArray[np.int64] = self.table.column(0).offsets.to_numpy()
        return np.diff(offsets)

    def scores(self, row: int) -> list[float]:
        """The scores of the row's texts, or none."""
        found: list[float] = self.table.column(1)[row].as_py()
        return found


def column_schema() -> pa.Schema:
    """Columns of the file."""
    texts, scores = pa.large_list(pa.large_string()), pa.large_list(pa.float32())
    return pa.schema([pa.field("texts", texts, nullable=False), pa.field("scores", scores, nullable=False)])


def column_file(name: str) -> str:
    """The name of a column's file, beside the index of its shard set."""
    return f"column-{name}.arrow"


def column_names(folder: Path) -> list[str]:
    """The columns of a shard set on disk, sorted."""
    return sorted(path.stem.removeprefix("column-") for path in folder.glob("column-*.arrow"))


def write_column(
    shard_set: ShardSet,
    name: str,
    texts: Sequence[Sequence[str]],
    about: Mapping[str, Any],
    scores: Sequence[Sequence[float]] | None = None,
    replace: bool = False,
) -> TextColumn:
    """Write a column of a shard set on disk; it appears complete or not at all.

    Args:
        shard_set: what it belongs to.
        name: small letters, digits and ``_``.
        texts: per row of the index its texts; empty ones are refused.
        about: how it was made, for whoever opens it; JSON.
        scores: per row as many numbers as texts, or none; None = no row has any.
        replace: whether an existing column of that name may be replaced.

    Raises:
        OptionError: a name that cannot be one, or a column that exists.
        DataError: a wrong number of rows or scores, an empty text, or the folder cannot be written.
    """
    path = new_column_path(shard_set, name, replace)
    scores = [()] * len(texts) if scores is None else scores
    _check(shard_set, path, texts, scores)
    values = [_lists(texts, pa.large_string()), _lists(scores, pa.float32())]
    head = {
        "name": name,
        "set": shard_set.fingerprint,
        "fingerprint": _fingerprint(texts, scores),
        "about": dict(about),
    }
    schema = column_schema().with_metadata({_ABOUT: json.dumps(head, ensure_ascii=False).encode()})

    def write(handle: Any) -> None:
        with pa.ipc.new_file(handle, schema) as writer:
            writer.write_batch(pa.record_batch(values, schema=schema))

    try:
        put_file(path, write)
    except OSError as error:
        fix = "make room or let this user write there; a read-only set can be copied with `cp -rs`"
        raise DataError(f"the column cannot be written ({error.strerror})", where=str(path), fix=fix) from error
    return open_column(shard_set, name)


def new_column_path(shard_set: ShardSet, name: str, replace: bool) -> Path:
    """Where a column will be written. Raises OptionError for a name that cannot be one, or a column that exists."""
    path = shard_set.dir / column_file(name)
    if not NAME.fullmatch(name):
        raise OptionError(f"{name!r} is no name of a column", where="text column", fix="use small letters, digits, _")
    if path.exists() and not replace:
        fix = "take another name (runs that read the old one go on), or say that it may be replaced"
        raise OptionError("the column exists", where=str(path), fix=fix)
    return path


def open_column(shard_set: ShardSet, name: str) -> TextColumn:
    """A column of a shard set, memory-mapped.

    Raises:
        DataError: there is none of that name, it is damaged, or it was made for other samples.
    """
    path = shard_set.dir / column_file(name)
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file.read_buffer()).read_all()
        head = json.loads(table.schema.metadata[_ABOUT])
        (batch,) = table.to_batches()
        column = TextColumn(str(head["name"]), str(head["set"]), str(head["fingerprint"]), head["about"], batch)
        if not table.schema.equals(column_schema()):
            raise ValueError(f"its columns are {', '.join(table.column_names)}")
    except FileNotFoundError:
        there = ", ".join(column_names(shard_set.dir)) or "none"
        fix = f"there is {there}; make it with `slt shards texts`, `pseudo-gloss` or `previous`"
        raise DataError(f"no text column {name!r}", where=str(shard_set.dir), fix=fix) from None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        fix = "delete this file and make it again"
        raise DataError(f"unreadable text column ({error})", where=str(path), fix=fix) from error
    if column.set_fingerprint != shard_set.fingerprint or len(column) != len(shard_set):
        raise DataError(
            f"the column was made for other samples ({len(column)} of the set {column.set_fingerprint[:12]}; this is "
            f"{len(shard_set)} of {shard_set.fingerprint[:12]})",
            where=str(path),
            fix="make it again, or take it over by sample: `slt shards texts SET NAME --from-set THE-OTHER`",
        )
    return column


def with_texts(shard_set: ShardSet, column: TextColumn) -> ShardSet:
    """The set with the first text of a column as every sample's own text. Samples for which the column says nothing
    belong to no split, so that no plan shows them."""
    said = [texts[0] if texts else "" for texts in column.table.column(0).to_pylist()]
    table, texts = shard_set.table, pa.array(said, pa.string())
    splits = pc.if_else(pc.equal(texts, ""), "", pc.cast(table["split"], pa.string()))
    table = table.set_column(table.schema.get_field_index("split"), "split", splits)
    changed = {"text": texts, "text_hash": [text_hash(text) for text in said], "tokens": [0] * len(said)}
    for name, values in changed.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    return dataclasses.replace(shard_set, table=table, mapped=None)


def _check(shard_set: ShardSet, path: Path, texts: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]) -> None:
    where = str(path)
    if len(texts) != len(shard_set) or len(scores) != len(shard_set):
        what = f"{len(texts)} rows of texts and {len(scores)} of scores for {len(shard_set)} samples"
        raise DataError(what, where=where, fix="give one row per sample, in the order of the index")
    for row, (said, sure) in enumerate(zip(texts, scores, strict=True)):
        if isinstance(said, str) or any(not text.strip() for text in said) or len(sure) not in (0, len(said)):
            key = f"{shard_set.table['corpus'][row].as_py()}/{shard_set.table['sample_id'][row].as_py()}"
            what = f"row {row} ({key}): {said!r} with scores {list(sure)!r}"
            raise DataError(
                what, where=where, fix="give a list of texts that are not empty, and a score for each or none"
            )


def _lists(rows: Sequence[Sequence[Any]], kind: pa.DataType) -> pa.Array:
    bounds = np.fromiter(accumulate(map(len, rows), initial=0), dtype=np.int64, count=len(rows) + 1)
    values = pa.array(list(chain.from_iterable(rows)), kind)
    return pa.LargeListArray.from_arrays(pa.array(bounds), values)


def _fingerprint(texts: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]) -> str:
    digest = hashlib.sha256()
    for said, sure in zip(texts, scores, strict=True):
        digest.update(json.dumps([list(said), np.asarray(sure, dtype="<f4").tolist()], ensure_ascii=False).encode())
    return digest.hexdigest()
