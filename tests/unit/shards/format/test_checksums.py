"""Joined CRC-32s are those of the joined bytes, for any lengths."""

from __future__ import annotations

import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shards.format.checksums import UNIT, Joiner

JOINER = Joiner()


@given(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=8), min_size=1, max_size=8), st.integers(0, 9))
def test_runs_have_the_crc_of_their_bytes(runs: list[list[int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    parts = [[random.bytes(UNIT * size) for size in run] for run in runs]
    flat = [part for run in parts for part in run]
    starts = np.cumsum([0, *map(len, runs)])[:-1]
    crcs, sizes = np.asarray([zlib.crc32(part) for part in flat]), np.asarray([len(part) for part in flat])
    assert JOINER.runs(crcs, sizes, starts).tolist() == [zlib.crc32(b"".join(run)) for run in parts]


def test_long_distances_make_the_tables_grow() -> None:
    joiner = Joiner()
    for size in (10, 100_000, 2_000_000):
        parts = [b"begin!", bytes(range(256)) * (size // 256), b"end."]
        crcs, sizes = np.asarray([zlib.crc32(part) for part in parts]), np.asarray([len(part) for part in parts])
        assert joiner.runs(crcs, sizes, np.array([0])).tolist() == [zlib.crc32(b"".join(parts))]
