"""Tables without a header and tables of class numbers; rows in JSON objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shards.corpora import make_corpus
from shards.corpora.classes import Classes
from shards.corpora.table import Table
from shards.errors import DataError, OptionError
from tests.unit.shards.corpora.layouts import plain_json, segments_of


def test_columns_of_a_file_without_header(tmp_path: Path) -> None:
    """As AUTSL publishes its labels: a clip and the number of its class, and the classes in another file."""
    (tmp_path / "train_labels.csv").write_text("signer0_sample1,41\nsigner0_sample2,0\n")
    (tmp_path / "SignList_ClassId_TR_EN.csv").write_text('ClassId,TR,EN\n0,abla,sister\n41,"çok, pek",very\n', "utf-8")
    options = {
        "table": str(tmp_path / "train_labels.csv"), "columns": "video,label", "id": "video", "media": "video",
        "media_suffix": "_color.mp4", "text": "label", "classes": str(tmp_path / "SignList_ClassId_TR_EN.csv"),
    }  # fmt: skip
    first, second = segments_of(make_corpus("table", options))
    assert (first.id, first.text, second.text) == ("signer0_sample1", "çok, pek", "abla")
    assert first.origin.endswith("train_labels.csv:1") and first.media is not None
    assert first.media.path == tmp_path / "signer0_sample1_color.mp4"
    for columns in ("ClassId,EN", "1,3"):
        english = segments_of(make_corpus("table", {**options, "class_columns": columns}))
        assert [segment.text for segment in english] == ["very", "sister"]


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        ("a,b\n1,2,3\n", ["id", "text"], r"t\.csv:2: 3 fields, 2 columns are named"),
        ("id,text\n1,2\n", ["id", "text"], r"t\.csv:1: this line holds the columns' names\n  fix: leave --columns out"),
        ("1,2\n", ["name", "text"], r"no column 'id'; the header is \['name', 'text'\]"),
        ("clip1,Hallo\n", [], r"(?s)no column 'id', .* where the file has no header, name them: --columns NAME,NAME"),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, rows: str, columns: list[str], said: str) -> None:
    (tmp_path / "t.csv").write_text(rows)
    with pytest.raises(DataError, match=said):
        segments_of(Table(table=tmp_path / "t.csv", columns=columns, media="id"))


def test_fields_of_json_have_names(tmp_path: Path) -> None:
    path = plain_json(tmp_path / "a.json", [{"id": "a"}])
    with pytest.raises(OptionError, match=r"columns: \.json files name their own fields\n  fix: leave --columns out"):
        Table(table=path, columns=["id"])


@pytest.mark.parametrize(
    ("name", "content", "number", "word"),
    [
        ("c.json", '{"0": "book", "7": "thin person"}', "7", "thin person"),
        ("c.json", '["book", "thin person"]', "1", "thin person"),
        ("c.txt", "0\tbook\n1\tthin person\n", "1", "thin person"),
        ("c.txt", "0 book\n1 thin person\n", "1", "thin person"),
        ("c.txt", "book\nthin person\n", "1", "thin person"),
        ("c.csv", "id,word\n007,book\n", "7.0", "book"),
        ("c.tsv", "A01\tKennung\n", "A01", "Kennung"),
    ],
)
def test_class_lists(tmp_path: Path, name: str, content: str, number: str, word: str) -> None:
    (tmp_path / name).write_text(content)
    if name == "c.tsv":  # a first line without numbers is a header: then a class that is no number needs another one
        (tmp_path / name).write_text(f"class\tword\n{content}")
    assert Classes(tmp_path / name).word(number, "x") == word


@pytest.mark.parametrize(
    ("content", "columns", "error", "said"),
    [
        ("0,a\n0,b\n", [], DataError, r"c\.csv:2: the class 0 is 'a' and 'b'\n  fix: keep one of the two"),
        ("0,a\n1\n", [], DataError, r"c\.csv:2: 1 fields\n  fix: repair the line: class and word"),
        ('0,"a\n', [], DataError, r"c\.csv:1: broken quoting \(.*\) in one line"),
        ("0,a\n", ["0"], OptionError, r"1 columns\n  fix: name two: --class-columns NUMBER,WORD"),
        ("i,w\n0,a\n", ["i", "EN"], OptionError, r"no column 'EN'; there are \['i', 'w'\]\n  fix: correct --class-col"),
        (
            "0,a\n",
            [],
            DataError,
            r"x: no class '8' among the 1 of c\.csv\n  fix: use the class list of the same corpus",
        ),
    ],
)
def test_class_lists_that_do_not_fit(
    tmp_path: Path, content: str, columns: list[str], error: type[DataError], said: str
) -> None:
    (tmp_path / "c.csv").write_text(content)
    with pytest.raises(error, match=said):
        Classes(tmp_path / "c.csv", columns).word("8", "x")


def test_a_class_list_of_no_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the class 0 is 1, no word"):
        Classes(plain_json(tmp_path / "c.json", {"0": 1}))
    with pytest.raises(DataError, match="a str, no list of classes"):
        Classes(plain_json(tmp_path / "c.json", "text"))


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ({"a": {"media": "a.mp4", "text": "eins"}, "b": {"media": "b.mp4", "text": "zwei"}}, {"id": "key"}),
        ({"a.mp4": "eins", "b.mp4": "zwei"}, {"id": "key", "media": "key", "text": "value"}),
        ({"x": {"key": "a", "media": "a.mp4", "text": "eins"}, "y": {"key": "b", "media": "b.mp4", "text": "zwei"}},
         {"id": "key"}),
    ],
)  # fmt: skip
def test_rows_in_a_json_object(tmp_path: Path, content: Any, options: dict[str, str]) -> None:
    path = plain_json(tmp_path / "rows.json", content)
    segments = segments_of(make_corpus("table", {"table": str(path), **options}))
    assert [(s.id.removesuffix(".mp4"), s.text) for s in segments] == [("a", "eins"), ("b", "zwei")]
    assert [s.media.path.name for s in segments if s.media] == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            json.dumps({"annotations": [{"id": 1}]}),
            r"'annotations' is a list: .*\n  fix: .* jq '\.annotations' a\.json",
        ),
        ('{"id": "a", "text": "x"}\n{"id": "b", "text": "y"}\n', r"JSON lines, .*\n  fix: name it a\.jsonl"),
        ('{"a": {"id": 1, "text": "x"}', r"not JSON: the end of the file after a row"),
        ('{"a": {"id": 1, "text": "x"}} x', r"not JSON: 'x' after the object"),
        ('{"a" 1}', r"not JSON: '1' after 'a'"),
        ("{1: 2}", r"not JSON: 1 is no name of a row"),
        ('{"a": {"id": 1}}', r"a\.json: a: no field 'text'; found \['id', 'key'\]"),
    ],
)
def test_json_objects_that_are_no_rows(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=said):
        segments_of(Table(table=tmp_path / "a.json", media="id"))
