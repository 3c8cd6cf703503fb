"""The samples of a plan and the numbers the index holds about them, read where they lie.

Sample numbers run through the selected rows of the sources, one source after another. Nothing is copied when an index
is memory-mapped (:func:`shards.format.index.open_index`): every rank and worker of a host then shares the same pages.
Text is read row by row when asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format.index import NAMES, ShardSet, with_numbered_names
from shards.order.rows import RowReader, names_of
from shards.order.shuffle import Ints
from shards.schema import IndexRow

NUMBERS = ("offset", "size", "crc32", "meta_offset", "meta_size", "meta_crc32", "frames", "tokens", "text_hash")
"""The columns a plan gives as numbers; see :class:`shards.schema.IndexRow`."""

_MOST_RUNS = 1 << 14  # more stretches of selected rows than this are kept row by row

Numbers: TypeAlias = NDArray[np.integer[Any]]
Choose = Callable[[dict[str, Numbers]], NDArray[np.bool_]]
"""Which rows of a batch to keep, by their numbers (NUMBERS)."""


class _Pieces:
    """The column of a memory-mapped file, which lies there in pieces: indexed by rows as if it were one array."""

    def __init__(self, pieces: Sequence[Numbers], file: pa.Buffer) -> None:
        size = pieces[0].dtype.itemsize
        self._file: Numbers = np.frombuffer(file, dtype=pieces[0].dtype, count=file.size // size)
        places = [(piece.ctypes.data - file.address) // size for piece in pieces]  # Arrow aligns them to 8 bytes
        self._bounds = np.cumsum([0, *map(len, pieces)])[:-1]
        self._shifts = np.asarray(places, dtype=np.int64) - self._bounds

    def __getitem__(self, rows: Any) -> Any:
        return self._file[rows + self._shifts[self._bounds.searchsorted(rows, side="right") - 1]]


class _Rows:
    """The rows of a table that a source selects, in order: few long stretches, or row by row."""

    def __init__(self, keep: NDArray[np.bool_]) -> None:
        edges = np.flatnonzero(np.diff(keep, prepend=False, append=False)).reshape(-1, 2)
        sizes = edges[:, 1] - edges[:, 0]
        self.count = int(sizes.sum())
        self._bounds = np.cumsum([0, *sizes])[:-1]
        self._shifts = edges[:, 0] - self._bounds
        self._rows = np.flatnonzero(keep) if len(edges) > _MOST_RUNS else None

    def __getitem__(self, samples: Any) -> Any:
        """Table rows of these samples, counted from the source's first."""
        if self._rows is not None:
            return self._rows[samples]
        if len(self._shifts) == 1:
            return samples + self._shifts[0]
        return samples + self._shifts[np.searchsorted(self._bounds, samples, side="right") - 1]


class Column:
    """A number of every sample: indexed by one sample number it gives an int, by an array of them int64.

    Args:
        sources: of every source, the rows it selects, the column of its table (any integer type), and what is added
            to its values.
    """

    def __init__(self, sources: Sequence[tuple[_Rows, Numbers | _Pieces, int]]) -> None:
        self._sources = sources
        self._firsts = np.cumsum([0, *(rows.count for rows, _, _ in sources)])
        self._begins: list[int] = self._firsts[:-1].tolist()

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @overload
    def __getitem__(self, samples: int | np.integer[Any]) -> int: ...
    @overload
    def __getitem__(self, samples: Numbers) -> Ints: ...
    def __getitem__(self, samples: int | np.integer[Any] | Numbers) -> int | Ints:
        if not isinstance(samples, np.ndarray):
            source = bisect_right(self._begins, samples) - 1
            rows, values, added = self._sources[source]
            return int(values[rows[samples - self._begins[source]]]) + added
        if len(self._sources) == 1:
            return self._of(0, samples)
        source_of = np.searchsorted(self._firsts, samples, side="right") - 1
        found = np.empty(len(samples), dtype=np.int64)
        for source in np.unique(source_of).tolist():
            mine = source_of == source
            found[mine] = self._of(source, samples[mine] - self._firsts[source])
        return found

    def _of(self, source: int, samples: Numbers) -> Ints:
        return self.of_rows(source, self._sources[source][0][samples])

    def of_rows(self, source: int, rows: Numbers) -> Ints:
        """The values in these rows of a source's table."""
        _, values, added = self._sources[source]
        found: Ints = values[rows].astype(np.int64, copy=False)
        return found + added if added else found


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
        self._rows: list[_Rows] = []
        columns: dict[str, list[tuple[_Rows, Numbers | _Pieces, int]]] = {name: [] for name in ("shard", *NUMBERS)}
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
            for name, found in columns.items():
                added = len(self.shards) if name == "shard" else 0
                found.append((rows, _joined([_numbers(b, name) for b in batches], shard_set.mapped), added))
            names = names_of(batches[0])
            self.shards += [shard_set.dir / name for name in names["shard"]]
            self._names.append(names)
            self._batches.append(batches)
            self._batch_rows.append(np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist())
            self._rows.append(rows)
        self.counts: tuple[int, ...] = tuple(rows.count for rows in self._rows)
        """Samples of every source."""
        self.columns = {name: Column(found) for name, found in columns.items()}
        self.shard_of = self.columns.pop("shard")
        """Number of every sample's tar."""
        self._firsts: list[int] = np.cumsum([0, *self.counts]).tolist()
        self._readers: dict[tuple[int, int], RowReader] = {}

    def __len__(self) -> int:
        return sum(self.counts)

    def numbers(self, names: Sequence[str], samples: Numbers) -> list[Ints]:
        """These columns (NUMBERS, or ``shard`` for the number of the tar) for these samples, in one go."""
        columns = [self.shard_of if name == "shard" else self.columns[name] for name in names]
        if len(self.counts) > 1:
            return [column[samples] for column in columns]
        rows = self._rows[0][samples]
        return [column.of_rows(0, rows) for column in columns]

    def row(self, sample: int) -> IndexRow:
        """The index row of one sample."""
        return self.rows(np.asarray([sample], dtype=np.int64))[0]

    def rows(self, samples: Ints) -> list[IndexRow]:
        """The index rows of these samples."""

        def of_source(source: int, samples: Ints) -> list[IndexRow]:
            batches = self._batch_rows[source]
            return _by_part(batches, self._rows[source][samples], lambda batch, rows: self._reader(source, batch)(rows))

        return _by_part(self._firsts, samples, of_source)

    def _reader(self, source: int, batch: int) -> Callable[[Ints], list[IndexRow]]:
        if (source, batch) not in self._readers:
            self._readers[source, batch] = RowReader(self._batches[source][batch], self._names[source])
        return self._readers[source, batch].rows

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the index for all samples, text included: for small sets, or one column at a time."""
        found = []
        for batches, rows in zip(self._batches, self._rows, strict=True):
            whole = pa.chunked_array([batch.column(name) for batch in batches])
            values = whole.take(pa.array(rows[np.arange(rows.count)]))
            found += (values.cast(pa.string()) if name in NAMES else values).chunks
        return pa.chunked_array(found)

    def distinct(self, name: str) -> list[str]:
        """The values of one of the NAMES that occur, sorted."""
        return sorted(self.column(name).unique().to_pylist())


def _by_part(firsts: Sequence[int], numbers: Ints, read: Callable[[int, Ints], list[IndexRow]]) -> list[IndexRow]:
    """``read(part, numbers counted from the part's first)`` for numbers that run through parts, in their order."""
    if len(firsts) == 2:
        return read(0, numbers)
    parts = np.searchsorted(firsts, numbers, side="right") - 1
    found: dict[int, IndexRow] = {}
    for part in np.unique(parts).tolist():
        mine = np.flatnonzero(parts == part)
        found.update(zip(mine.tolist(), read(part, numbers[mine] - firsts[part]), strict=True))
    return [found[place] for place in range(len(numbers))]


def _select(batches: Sequence[pa.RecordBatch], wanted: tuple[str, str | None], choose: Choose) -> tuple[_Rows, int]:
    """The rows of a source, and how many there would be without ``choose``."""
    kept = [np.zeros(0, dtype=bool)]
    matching = 0
    for batch in batches:
        keep = np.ones(batch.num_rows, dtype=bool)
        for column, value in zip(("split", "corpus"), wanted, strict=True):
            if value is not None:
                names = batch.column(column).dictionary.to_pylist()
                keep &= _numbers(batch, column) == (names.index(value) if value in names else -1)
        matching += int(keep.sum())
        kept.append(keep & choose({name: _numbers(batch, name) for name in NUMBERS}))
    return _Rows(np.concatenate(kept)), matching


def _numbers(batch: pa.RecordBatch, name: str) -> Numbers:
    """A column of numbers, or of the numbers of names, as a view."""
    values = batch.column(name)
    numbers: Numbers = (values.indices if pa.types.is_dictionary(values.type) else values).to_numpy()
    return numbers


def _joined(pieces: Sequence[Numbers], mapped: pa.Buffer | None) -> Numbers | _Pieces:
    """A column in one: by addresses where the index is memory-mapped, else as one array."""
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if mapped is None else _Pieces(pieces, mapped)


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
    found = sorted(f"{p['split']}/{p['corpus']}" for p in pairs.group_by(pairs.column_names).aggregate([]).to_pylist())
    return DataError(
        f"no sample has split {split!r} and corpus {corpus or 'any'!r}; there are "
        + (", ".join(found[:20]) or "no samples at all"),
        where=str(shard_set.dir),
        fix="name one of these in the data section",
    )
