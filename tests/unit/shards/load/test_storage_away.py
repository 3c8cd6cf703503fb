"""Storage that does not answer stops the reading side: what cannot be read now is no damaged sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import DataError
from shards.format.index import read_index
from shards.load.features import read_features
from shards.load.reader import Reader, SampleReader
from shards.load.substitute import fetch_item
from shards.order.items import Elements
from shards.order.options import PlanOptions, Source
from shards.order.plan import Cursor, Plan
from shards.storage.store import StoreError
from tests.unit.shards.shard_sets import write_texts, write_videos

AWAY = StoreError("no answer", where="s3://bucket/set", fix="try again later")


def clips(folder: Path, **options: Any) -> Reader:
    made = write_videos(folder, [bytes([n]) * 40 for n in range(8)], [4] * 8)
    return Reader(Plan([Source(read_index(made))], PlanOptions("clip", shuffle=False, **options)))


def away(*args: object, **options: object) -> Any:
    raise AWAY


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_no_substitute_is_read_for_it(tmp_path: Path, answers: int) -> None:
    """At once, when the samples are looked at one by one, and when a substitute is looked for."""
    reader, asked = clips(tmp_path / "set"), []

    def fetch(reader: SampleReader, item: Elements) -> list[Any]:
        asked.append(item["sample"].tolist())
        if len(asked) > answers:
            raise AWAY
        raise DataError("damaged", where="a shard", fix="none")

    items, end = reader.plan.items(Cursor(0, 0), 1)
    with pytest.raises(StoreError, match="no answer"):
        fetch_item(reader, fetch, items.item(0), lambda: end)
    assert len(asked) == answers + 1


def test_reading_several_samples_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = clips(tmp_path / "clips")
    monkeypatch.setattr(reader._bytes, "views", away)
    with pytest.raises(StoreError, match="no answer"):
        reader.payloads([0, 1], 1 << 20)
    folder = write_texts(tmp_path / "texts", [np.arange(5, dtype=np.uint16)] * 4)
    texts = Reader(Plan([Source(read_index(folder))], PlanOptions("pack", block_tokens=8)))
    monkeypatch.setattr(texts._bytes, "read", away)
    with pytest.raises(StoreError, match="no answer"):
        texts.packs(texts.plan.epoch(0))


def test_features_that_are_not_whole_frames_are_named(tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "set", [b"1234567"], [4])
    reader = Reader(Plan([Source(read_index(folder))], PlanOptions("clip")))
    with pytest.raises(DataError, match=r"7 bytes are not 4 rows of float16\n  fix: run `slt shards lint DIR`"):
        read_features(reader, 0, 0, 1)
