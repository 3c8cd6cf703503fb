"""The samples of a plan: the selected rows of its sources, one source after another, with what the index knows of them.

Numbers are read where they lie (:mod:`shards.order.columns`); text is read row by row when asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.index import NAMES, ShardSet, with_numbered_names
from shards.format.text_columns import TextColumn
from shards.order.columns import NUMBERS, Column, Numbers, SelectedRows, SourceColumn, joined_column, numbers_of
from shards.order.rows import RowReader, names_of
from shards.order.shuffle import Ints
from shards.schema import IndexRow

Choose = Callable[[dict[str, Numbers]], NDArray[np.bool_]]
"""Which rows of a batch to keep, by their numbers (NUMBERS)."""


class Samples:
    """The selected rows of all sources.

    Args:
        selections: per source the shard set, the split, and the corpus (None = all).
        choose: which of their rows to keep, by the numbers of the index.

    Raises:
        DataError: no row of a source is selected.
    """

    def __init__(self, selections: Sequence[tuple[ShardSet, str, str | None]], choose: Choose) -> None:
        self._batches: list[list[pa.RecordBatch]] = []
        self._batch_rows: list[list[int]] = []
        self._names: list[dict[str, list[str]]] = []
        self._rows: list[SelectedRows] = []
        columns: dict[str, list[SourceColumn]] = {name: [] for name in ("shard", *NUMBERS)}
        self.shards: list[Path] = []
        """The tars of all sources."""
        self.left_out = 0
        """Rows of the sources that ``choose`` did not keep."""
        for shard_set, split, corpus in selections:
            batches = with_numbered_names(shard_set.table).to_batches()
            rows, matching = _select(batches, (split, corpus), choose)
            if not rows.count:
                raise _nothing_matches(shard_set, split, corpus, matching)
            self.left_out += matching - rows.count
            for name, parts in columns.items():
                added = len(self.shards) if name == "shard" else 0
                parts.append((rows, joined_column([numbers_of(b, name) for b in batches], shard_set.mapped), added))
            names = names_of(batches[0])
            self.shards += [shard_set.dir / name for name in names["shard"]]
            self._names.append(names)
            self._batches.append(batches)
            self._batch_rows.append(np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist())
            self._rows.append(rows)
        self.text_tokens: Ints | None = None
        """[n_samples] tokens of every text, where they are not those of the index."""
        self.counts: tuple[int, ...] = tuple(rows.count for rows in self._rows)
        """Samples of every source."""
        self.columns: dict[str, Column] = {name: Column(parts) for name, parts in columns.items()}
        """Numbers of the index by name (NUMBERS): an int for one sample, int64 for an array of them."""
        self.shard_of = self.columns.pop("shard")
        """Number of every sample's tar."""
        self._firsts: list[int] = np.cumsum([0, *self.counts]).tolist()
        self._readers: dict[tuple[int, int], RowReader] = {}
        self.text_columns: Sequence[Mapping[str, TextColumn]] = [{} for _ in selections]
        """Per source the text columns that the run reads, by name."""

    def __len__(self) -> int:
        return sum(self.counts)

    def numbers(self, names: Sequence[str], samples: Numbers) -> list[Ints]:
        """Several ``columns``, or ``shard`` for ``shard_of``, of these samples: cheaper than one by one."""
        columns = [self.shard_of if name == "shard" else self.columns[name] for name in names]
        if len(self.counts) > 1:
            return [column[samples] for column in columns]
        rows = self._rows[0][samples]
        return [column.of_rows(0, rows) for column in columns]

    def shard_path(self, sample: int) -> Path:
        """The tar that holds a sample."""
        return self.shards[self.shard_of[sample]]

    def row(self, sample: int) -> IndexRow:
        """The index row of one sample, text included."""
        return self.rows(np.asarray([sample], dtype=np.int64))[0]

    def rows(self, samples: Ints) -> list[IndexRow]:
        """``row`` of every one of these samples, at a fraction of the cost."""

        def of_source(source: int, samples: Ints) -> list[IndexRow]:
            batches = self._batch_rows[source]
            return _by_part(batches, self._rows[source][samples], lambda batch, rows: self._reader(source, batch)(rows))

        return _by_part(self._firsts, samples, of_source)

    def texts(self, column: str, sample: int) -> list[str]:
        """What a text column says of a sample, possibly nothing. KeyError for a column that the run does not read."""
        source, row = self.place(sample)
        return self.text_columns[source][column].texts(row)

    def scores(self, column: str, sample: int) -> list[float]:
        """The scores of the sample's ``texts``, one each or none."""
        source, row = self.place(sample)
        return self.text_columns[source][column].scores(row)

    def text_counts(self, column: str) -> Ints:
        """[n_samples] how many texts a text column has of each sample."""
        parts = zip(self.text_columns, self._rows, strict=True)
        return np.concatenate([columns[column].counts()[rows[np.arange(rows.count)]] for columns, rows in parts])

    def place(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and its row in the source's index."""
        source = bisect_right(self._firsts, sample) - 1
        return source, int(self._rows[source][sample - self._firsts[source]])

    def _reader(self, source: int, batch: int) -> Callable[[Ints], list[IndexRow]]:
        if (source, batch) not in self._readers:
            self._readers[source, batch] = RowReader(self._batches[source][batch], self._names[source])
        return self._readers[source, batch].rows

    def column(self, name: str) -> pa.ChunkedArray:
        """[n_samples] one column of the index, text included."""
        chunks = []
        for batches, rows in zip(self._batches, self._rows, strict=True):
            whole = pa.chunked_array([batch.column(name) for batch in batches])
            values = whole.take(pa.array(rows[np.arange(rows.count)]))
            chunks += (values.cast(pa.string()) if name in NAMES else values).chunks
        return pa.chunked_array(chunks)

    def table(self) -> pa.Table:
        """[n_samples] all columns of the index; for small sets."""
        return pa.table({name: self.column(name) for name in IndexRow._fields})

    def distinct(self, name: str) -> list[str]:
        """The values of one of the NAMES that occur, sorted."""
        return sorted(self.column(name).unique().to_pylist())


def _by_part(firsts: Sequence[int], numbers: Ints, read: Callable[[int, Ints], list[IndexRow]]) -> list[IndexRow]:
    """``read(part, numbers counted from the part's first)`` for numbers that run through parts, in their order."""
    if len(firsts) == 2:
        return read(0, numbers)
    parts = np.searchsorted(firsts, numbers, side="right") - 1
    by_place: dict[int, IndexRow] = {}
    for part in np.unique(parts).tolist():
        mine = np.flatnonzero(parts == part)
        by_place.update(zip(mine.tolist(), read(part, numbers[mine] - firsts[part]), strict=True))
    return [by_place[place] for place in range(len(numbers))]


def _select(
    batches: Sequence[pa.RecordBatch], wanted: tuple[str, str | None], choose: Choose
) -> tuple[SelectedRows, int]:
    """The rows of a source, and how many there would be without ``choose``."""
    kept = [np.zeros(0, dtype=bool)]
    matching = 0
    for batch in batches:
        keep = np.ones(batch.num_rows, dtype=bool)
        for column, value in zip(("split", "corpus"), wanted, strict=True):
            if value is not None:
                names = batch.column(column).dictionary.to_pylist()
                keep &= numbers_of(batch, column) == (names.index(value) if value in names else -1)
        matching += int(keep.sum())
        kept.append(keep & choose({name: numbers_of(batch, name) for name in NUMBERS}))
    return SelectedRows(np.concatenate(kept)), matching


def _nothing_matches(shard_set: ShardSet, split: str, corpus: str | None, matching: int) -> DataError:
    if matching:
        return DataError(
            f"none of the {matching} samples with split {split!r} and corpus {corpus or 'any'!r} can be shown: "
            "they are empty or longer than block_tokens",
            where=str(shard_set.dir),
            fix="raise block_tokens, or name another split",
        )
    names = shard_set.table.select(["split", "corpus"])
    pairs = pa.table({name: pc.cast(names[name], pa.string()) for name in names.column_names})
    choices = sorted(
        f"{p['split']}/{p['corpus']}" for p in pairs.group_by(pairs.column_names).aggregate([]).to_pylist()
    )
    return DataError(
        f"no sample has split {split!r} and corpus {corpus or 'any'!r}; there are "
        + (", ".join(choices[:20]) or "no samples at all"),
        where=str(shard_set.dir),
        fix="name one of these in the data section",
    )
