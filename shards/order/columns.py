"""Numbers that the index holds about the samples of a plan, read where they lie.

Nothing is copied when an index is memory-mapped (:func:`shards.format.index.open_index`): every rank and worker of a
host then shares the same pages.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.order.shuffle import Ints

NUMBERS = ("offset", "size", "crc32", "meta_offset", "meta_size", "meta_crc32", "frames", "tokens", "text_hash")
"""The columns a plan gives as numbers; see :class:`shards.schema.IndexRow`."""

_MOST_RUNS = 1 << 14  # more stretches of selected rows than this are kept row by row

Numbers: TypeAlias = NDArray[np.integer[Any]]


class PiecewiseColumn:
    """The column of a memory-mapped file, which lies there in pieces: indexed by rows as if it were one array."""

    def __init__(self, pieces: Sequence[Numbers], file: pa.Buffer) -> None:
        size = pieces[0].dtype.itemsize
        self._file: Numbers = np.frombuffer(file, dtype=pieces[0].dtype, count=file.size // size)
        places = [(piece.ctypes.data - file.address) // size for piece in pieces]  # Arrow aligns them to 8 bytes
        self._bounds = np.cumsum([0, *map(len, pieces)])[:-1]
        self._shifts = np.asarray(places, dtype=np.int64) - self._bounds

    def __getitem__(self, rows: Any) -> Any:
        return self._file[rows + self._shifts[self._bounds.searchsorted(rows, side="right") - 1]]


class SelectedRows:
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


SourceColumn: TypeAlias = tuple[SelectedRows, Numbers | PiecewiseColumn, int]
"""Of one source: the rows it selects, the column of its table (any integer type), and what is added to its values."""


class Column:
    """A number of every sample: indexed by one sample number it gives an int, by an array of them int64.

    Args:
        sources: one after another.
    """

    def __init__(self, sources: Sequence[SourceColumn]) -> None:
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
            rows, column, added = self._sources[source]
            return int(column[rows[samples - self._begins[source]]]) + added
        if len(self._sources) == 1:
            return self._of(0, samples)
        source_of = np.searchsorted(self._firsts, samples, side="right") - 1
        values = np.empty(len(samples), dtype=np.int64)
        for source in np.unique(source_of).tolist():
            mine = source_of == source
            values[mine] = self._of(source, samples[mine] - self._firsts[source])
        return values

    def _of(self, source: int, samples: Numbers) -> Ints:
        return self.of_rows(source, self._sources[source][0][samples])

    def of_rows(self, source: int, rows: Numbers) -> Ints:
        """The values in these rows of a source's table."""
        _, column, added = self._sources[source]
        values: Ints = column[rows].astype(np.int64, copy=False)
        return values + added if added else values


def numbers_of(batch: pa.RecordBatch, name: str) -> Numbers:
    """A column of numbers, or of the numbers of names, as a view."""
    values = batch.column(name)
    numbers: Numbers = (values.indices if pa.types.is_dictionary(values.type) else values).to_numpy()
    return numbers


def joined_column(pieces: Sequence[Numbers], mapped: pa.Buffer | None) -> Numbers | PiecewiseColumn:
    """A column in one: by addresses where the index is memory-mapped, else as one array."""
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if mapped is None else PiecewiseColumn(pieces, mapped)
