"""Rows of the index as Python values, many at a time: Arrow converts one value in the time this takes for a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from shards.order.shuffle import Ints
from shards.schema import IndexRow

_Values = Callable[[Ints], list[Any]]


class RowReader:
    """The rows of one batch of an index, whose columns are texts, numbers, and texts as Arrow dictionaries.

    Args:
        batch: the columns of :class:`shards.schema.IndexRow`.
        names: the values of those that are dictionaries, by column: batches share them, as there may be very many.
    """

    def __init__(self, batch: pa.RecordBatch, names: Mapping[str, list[str]]) -> None:
        self._columns = [_values_of(batch.column(name), names.get(name, [])) for name in IndexRow._fields]

    def rows(self, numbers: Ints) -> list[IndexRow]:
        """The rows with these numbers, counted from the first of the batch."""
        return list(map(IndexRow._make, zip(*(values(numbers) for values in self._columns), strict=True)))


def names_of(batch: pa.RecordBatch) -> dict[str, list[str]]:
    """The values of the columns that are dictionaries."""
    columns = {name: batch.column(name) for name in batch.schema.names}
    return {name: c.dictionary.to_pylist() for name, c in columns.items() if pa.types.is_dictionary(c.type)}


def _values_of(column: pa.Array, names: list[str]) -> _Values:
    if pa.types.is_dictionary(column.type):
        numbers = column.indices.to_numpy()
        return lambda rows: [names[number] for number in numbers[rows].tolist()]
    if pa.types.is_string(column.type):
        return _texts_of(column)
    numbers = column.to_numpy()
    return lambda rows: numbers[rows].tolist()


def _texts_of(column: pa.Array) -> _Values:
    _, bounds, data = column.buffers()
    offsets = np.frombuffer(bounds, dtype=np.int32)[column.offset :]
    view = memoryview(data) if data is not None else memoryview(b"")

    def texts(rows: Ints) -> list[str]:
        return [
            str(view[begin:end], "utf-8")
            for begin, end in zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
        ]

    return texts
