"""Reads what a micro-batch needs in few large pieces."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from shards.load.documents import Pack
from shards.load.reader import Reader, SampleReader
from shards.order.items import Elements, Items
from shards.schema import IndexRow

_MOST_BYTES = 32 << 20
"""Most bytes of clips read at once."""


class ReadAhead(SampleReader):
    """A reader that knows which items are asked for, and reads several of them when one is.

    Damage is reported when the damaged sample is asked for. Samples of other items can be read as well.

    Args:
        reader: does the reading.
        items: what will be asked for, in this order.
    """

    def __init__(self, reader: Reader, items: Items) -> None:
        self.plan, self._reader, self._items = reader.plan, reader, items
        self._payloads: dict[int, memoryview] = {}

    def payload(self, sample: int) -> memoryview:
        """As :meth:`Reader.payload`; the payloads of the samples that follow are read with it."""
        if sample not in self._payloads and sample in self._unread:
            first = self._unread.index(sample)
            self._payloads = {}  # before the next ones are read: memory for one block at a time
            count, self._payloads = self._reader.payloads(self._unread[first:], _MOST_BYTES)
            del self._unread[first : first + count]
        payload = self._payloads.get(sample)
        return self._reader.payload(sample) if payload is None else payload

    def row(self, sample: int) -> IndexRow:
        """As :meth:`Reader.row`; the rows of all items are made together."""
        row = self._rows.get(sample)
        return self._reader.row(sample) if row is None else row

    def meta(self, sample: int) -> dict[str, Any]:
        """As :meth:`Reader.meta`."""
        return self._reader.meta(sample)

    def pack(self, item: Elements) -> Pack:
        """As :meth:`Reader.pack`; the packs of all items are read together."""
        pack = self._packs.get(item.tobytes())
        return self._reader.pack(item) if pack is None else pack

    @cached_property
    def _packs(self) -> dict[bytes, Pack]:
        return self._reader.packs(self._items)

    @cached_property
    def _unread(self) -> list[int]:
        """Samples whose payloads were not read yet, in order."""
        return self._samples()

    @cached_property
    def _rows(self) -> dict[int, IndexRow]:
        samples = self._samples()
        return dict(zip(samples, self.plan.samples.rows(np.asarray(samples, dtype=np.int64)), strict=True))

    def _samples(self) -> list[int]:
        """The samples of the items, each once, in order."""
        return list(dict.fromkeys(self._items.elements["sample"].tolist()))
