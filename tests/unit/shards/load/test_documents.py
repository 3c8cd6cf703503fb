"""Packs of documents read in any order: the right tokens, and exactly the damaged packs named."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from shards.format.checksums import Joiner
from shards.load.documents import Documents, in_order

LENGTHS = np.array([3, 700, 1, 40, 40, 2])
STARTS = np.array([0, 2, 3, 6])


def read(width: int, order: list[int], shift: int = 0) -> tuple[Documents, list[np.ndarray]]:
    """Documents that lie in this order in what was read, after some other bytes."""
    random = np.random.default_rng(0)
    documents = [random.integers(0, 60_000, length).astype(f"<u{width}") for length in LENGTHS]
    sizes, begins = LENGTHS * width, np.zeros(len(LENGTHS), dtype=np.int64)
    data = bytes(shift)
    for number in order:
        begins[number] = len(data)
        data += documents[number].tobytes()
    widths = np.full(len(LENGTHS), width)
    return Documents(np.frombuffer(data, dtype=np.uint8), begins, sizes, widths, STARTS), documents


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("shift", [0, 8, 3])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [4, 2, 0, 1, 5, 3]])
def test_packs_hold_their_documents(width: int, shift: int, order: list[int]) -> None:
    found, documents = read(width, order, shift)
    packs = in_order(found).packs()
    assert [pack.lengths.tolist() for pack in packs] == [[3, 700], [1], [40, 40, 2]]
    got = [document for pack in packs for document in pack.documents()]
    assert all(np.array_equal(a, b) and a.dtype == f"<u{width}" for a, b in zip(got, documents, strict=True))


def test_documents_of_two_and_four_bytes_share_a_pack() -> None:
    data = np.frombuffer(np.arange(5, dtype="<u2").tobytes() + np.arange(70_000, 70_003, dtype="<u4").tobytes(), "u1")
    found = Documents(data, np.array([0, 10]), np.array([10, 12]), np.array([2, 4]), np.array([0, 2]))
    assert found.packs()[0].ids.tolist() == [0, 1, 2, 3, 4, 70_000, 70_001, 70_002]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [4, 2, 0, 1, 5, 3]])
def test_only_damaged_packs_are_named(order: list[int]) -> None:
    joiner = Joiner()
    found, documents = read(2, order)
    crcs = np.asarray([zlib.crc32(document.tobytes()) for document in documents])
    assert in_order(found).intact(crcs, joiner).tolist() == [True, True, True]
    for number, pack in ((0, 0), (2, 1), (3, 2), (5, 2)):
        data = found.data.copy()
        data[found.begins[number]] ^= 1
        damaged = in_order(found._replace(data=data))
        assert np.flatnonzero(~damaged.intact(crcs, joiner)).tolist() == [pack]
        unknown = np.where(np.arange(len(crcs)) == number, -1, crcs)  # a part of a document cannot be checked
        assert damaged.intact(unknown, joiner).all()
        if number != 3:
            unknown = np.where(np.arange(len(crcs)) == 3, -1, crcs)
            assert np.flatnonzero(~damaged.intact(unknown, joiner)).tolist() == [pack]
