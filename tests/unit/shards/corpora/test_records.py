"""JSON arrays and Parquet tables, read piece by piece, with every fault they meet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.corpora import records
from shards.corpora.records import parquet_columns, read_json_array, read_parquet
from shards.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=6,
)


def entries(path: Path, needed: tuple[str, ...] = ()) -> list[tuple[int, dict[str, Any]]]:
    return list(read_json_array(path, needed))


class TestJsonArrays:
    @pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
    def test_pieces_of_any_size(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
        monkeypatch.setattr(records, "_CHUNK_BYTES", chunk)
        path = tmp_path / "a.json"
        content = [{"text": '共同关注 \\ " ]', "number": 1234567}, {}, {"deep": [{"a": [1, 2]}], "u": "\u00e9"}]
        for text in (json.dumps(content), json.dumps(content, ensure_ascii=False, indent=2), "\ufeff [] \n"):
            path.write_text(text, encoding="utf-8")
            assert entries(path) == ([] if "\ufeff" in text else list(enumerate(content, 1)))

    def test_utf16_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text("[]", encoding="utf-16")
        with pytest.raises(DataError, match=r"a\.json: UTF-16 .*, not UTF-8\n  fix: convert it: iconv -f UTF-16"):
            entries(path)

    @given(content=st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=4))
    @settings(max_examples=50, deadline=None)
    def test_what_is_written_is_read(
        self, tmp_path_factory: pytest.TempPathFactory, content: list[dict[str, Any]]
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "round.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        assert entries(path) == list(enumerate(content, 1))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", r"a\.json: not a JSON array: it begins ''"),
            ('{"a": 1}', r"not a JSON array: it begins '\{'\n  fix: use a list of objects"),
            ('[{"a": 1}', r"not JSON: the end of the file after element 1"),
            ('[{"a": 1} {"a": 2}]', r"not JSON: '\{' after element 1"),
            ('[{"a": 1}] x', r"not JSON: 'x' after the list"),
            ('[{"a": 1}, {"a": }]', r"record 2: not JSON \(Expecting value"),
            ('[{"a": "x', r"record 1: not JSON \(Unterminated string"),
            ("[1]", r"record 1: a list element is int\n  fix: use a list of objects, or JSON lines"),
            ('[{"b": 1}]', r"record 1: no field 'a'; found \['b'\]"),
            ('[{"a": "\\ud800"}]', "record 1: half a surrogate pair in a text"),
            ('[{"a": ' + "[" * 100_000 + "]", "record 1: not JSON"),
        ],
    )
    def test_refused(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "a.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            entries(path, ("a",))

    def test_unreadable_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.json"
        with pytest.raises(DataError, match=r"a\.json: records cannot be read \(No such file"):
            entries(path)
        path.write_bytes(b'[{"a": "\xff"}]')
        with pytest.raises(DataError, match=r"a\.json: near byte 0: not UTF-8 \(invalid start byte\)"):
            entries(path)
        monkeypatch.setattr(records, "MAX_RECORD_CHARACTERS", 100)
        monkeypatch.setattr(records, "_CHUNK_BYTES", 64)
        path.write_text('[{"a": "' + "x" * 1000 + '"}]')
        with pytest.raises(DataError, match="record 1: not JSON"):
            entries(path)


class TestParquet:
    def test_rows_and_columns(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"a": range(5000), "b": ["x"] * 5000, "c": [[1.5]] * 5000}), path)
        assert parquet_columns(path) == ["a", "b", "c"]
        rows = list(read_parquet(path, ["a", "c"]))
        assert len(rows) == 5000 and rows[-1] == (5000, {"a": 4999, "c": [1.5]})
        with pytest.raises(DataError, match=r"a\.parquet: no field 'd'; found \['a', 'b', 'c'\]"):
            list(read_parquet(path, ["d"]))

    def test_broken_files(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file"):
            parquet_columns(path)
        pq.write_table(pa.table({"a": ["x" * 50] * 9000}), path, compression="snappy")
        payload = bytearray(path.read_bytes())
        payload[20:2000] = bytes(1980)
        path.write_bytes(payload)
        with pytest.raises(DataError, match=r"a\.parquet.*: not a readable Parquet file"):
            list(read_parquet(path, ["a"]))
        pq.write_table(pa.table({"a": ["abcdefg"]}), path, compression="none", use_dictionary=False)
        path.write_bytes(path.read_bytes().replace(b"abcdefg", b"abc\xffefg"))
        with pytest.raises(DataError, match=r"not a readable Parquet file .*invalid start byte"):
            list(read_parquet(path, ["a"]))
        path.write_bytes(b"PAR1 no parquet PAR1")
        with pytest.raises(DataError, match="not a readable Parquet file"):
            list(read_parquet(path, ["a"]))
