"""Rows of the index as Python values, many at a time: Arrow converts one value in the time this takes for a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from shards.order import Ints
from shards.schema import IndexRow

_Values = Callable[[Ints], list[Any]]


class RowReader:
    """The rows of one batch of an index, whose columns are texts, numbers, and texts as Arrow dictionaries."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._columns = [_values_of(batch.column(field.name)) for field in dataclasses.fields(IndexRow)]

    def rows(self, numbers: Ints) -> list[IndexRow]:
        """The rows with these numbers, counted from the first of the batch."""
        return list(map(IndexRow, *(values(numbers) for values in self._columns)))


def _values_of(column: pa.Array) -> _Values:
    if pa.types.is_dictionary(column.type):
        names: list[str] = column.dictionary.to_pylist()
        numbers = column.indices.to_numpy()
        return lambda rows: [names[number] for number in numbers[rows].tolist()]
    if pa.types.is_string(column.type):
        return _texts_of(column)
    found = column.to_numpy()
    return lambda rows: found[rows].tolist()  # type: ignore[no-any-return]


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
