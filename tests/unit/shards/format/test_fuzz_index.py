"""Any manifest and any index file: a DataError that names the file, or a set that can be used. Nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import DataError
from shards.format.index import INDEX_NAME, MANIFEST_NAME, read_index, read_manifest
from shards.format.verify import verify
from shards.order.plan import Cursor
from tests.unit.shards.shard_sets import write_texts

EXAMPLES = 200
SAMPLES = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = [np.arange(3 + number % 9, dtype="<u2") for number in range(SAMPLES)]
    return write_texts(tmp_path_factory.mktemp("fuzz") / "set", documents, per_shard=20)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "set"))


def mutate(blob: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """Replace ``remove`` bytes at a fraction of the file by other bytes, several times."""
    for at, remove, insert in changes:
        place = int(at * len(blob))
        blob = blob[:place] + insert + blob[place + remove :]
    return blob


CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 40) | st.just(1 << 30), st.binary(max_size=24)),
    min_size=1,
    max_size=3,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def opened(folder: Path) -> None:
    """Open the set and look at all of it; only a DataError that names the folder may come out."""
    try:
        found = read_index(folder)
        assert len(found) == sum(1 for _ in found.rows()) == sum(found.manifest.splits.values())
    except DataError as error:
        assert str(folder) in error.where and error.fix


@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_NAME])
def test_mutated_files(folder: Path, name: str) -> None:
    path = folder / name
    blob = path.read_bytes()

    @settings(max_examples=EXAMPLES)
    @given(CHANGES)
    def check(changes: list[tuple[float, int, bytes]]) -> None:
        path.write_bytes(mutate(blob, changes))
        opened(folder)

    check()


def test_every_cut_of_both_files(folder: Path) -> None:
    for name in (MANIFEST_NAME, INDEX_NAME):
        path = folder / name
        blob = path.read_bytes()
        for cut in range(0, len(blob) - 1, max(1, len(blob) // 150)):
            path.write_bytes(blob[:cut])
            with pytest.raises(DataError, match=r"unreadable (manifest|index)"):
                read_index(folder)
        path.write_bytes(blob)


def test_any_json_is_refused(folder: Path) -> None:
    path = folder / MANIFEST_NAME

    @settings(max_examples=EXAMPLES)
    @given(VALUES)
    def check(value: Any) -> None:
        path.write_text(json.dumps(value), encoding="utf-8")
        with pytest.raises(DataError) as caught:
            read_manifest(folder)
        assert str(path) in caught.value.where

    check()


def test_any_value_of_any_field(folder: Path) -> None:
    path = folder / MANIFEST_NAME
    values = json.loads(path.read_text())

    @settings(max_examples=EXAMPLES)
    @given(st.sampled_from(sorted(values)), VALUES)
    def check(field: str, value: Any) -> None:
        path.write_text(json.dumps({**values, field: value}), encoding="utf-8")
        opened(folder)

    check()


def test_a_changed_index_that_still_reads_is_found_by_verify(folder: Path) -> None:
    """Whatever flip the parquet reader lets through changes the fingerprint, or changes nothing."""
    path = folder / INDEX_NAME
    blob = path.read_bytes()
    intact = read_index(folder).table
    random = np.random.default_rng(0)
    for place in random.integers(0, len(blob), 150).tolist():
        mutated = bytearray(blob)
        mutated[place] ^= 1 << int(random.integers(8))
        path.write_bytes(mutated)
        try:
            table = read_index(folder).table
        except DataError:
            continue
        assert table.equals(intact) or "fingerprint" in {problem.rule for problem in verify(folder)}


@settings(max_examples=EXAMPLES)
@given(st.dictionaries(st.sampled_from(["epoch", "item", "consumed", "x"]), VALUES, max_size=4))
def test_any_cursor(values: dict[str, Any]) -> None:
    try:
        cursor = Cursor.from_dict(values)
    except DataError as error:
        assert error.where == "data state"
        return
    assert cursor.to_dict() == values
