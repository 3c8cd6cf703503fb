"""Files that are no tables: what they are called, and that the advice fits them."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.corpora import make_corpus
from shards.corpora.rows import read_lines
from shards.corpora.table import Table
from shards.errors import DataError, OptionError


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, "<x/>")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.csv"))
    return buffer.getvalue()


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": ["a"]}), buffer)
    return buffer.getvalue()


LABELS = pickle.dumps([{"name": "a", "text": "b"}])
EAF = b'<?xml version="1.0" encoding="UTF-8"?>\n<ANNOTATION_DOCUMENT FORMAT="3.0">'
WORKBOOK = zipped("[Content_Types].xml", "xl/workbook.xml")
KINDS = {
    "a.xlsx": (WORKBOOK, r"not text but a spreadsheet\n  fix: save it as CSV UTF-8"),
    "renamed.csv": (WORKBOOK, r"not text but a document of an office program\n  fix: save it as CSV UTF-8"),
    "old.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), r"not text but a spreadsheet\n  fix: save it as CSV"),
    "a.zip": (zipped("table.csv"), r"not text but a zip archive\n  fix: unpack it and pass the table inside"),
    "a.tar": (tarred(), r"not text but a tar archive\n  fix: unpack it"),
    "a.pkl": (
        LABELS,
        r"not text but a Python pickle\n  fix: label files of other projects are read with --labels FOLDER",
    ),
    "labels.train": (
        gzip.compress(LABELS),
        r"not text but a Python pickle compressed by gzip\n  fix: label files of",
    ),
    "table.csv": (gzip.compress(b"id,media\n"), r"not text but compressed by gzip\n  fix: name it NAME\.gz so that"),
    "labels.gz": (gzip.compress(LABELS), r"not text but a Python pickle\n  fix: label files"),
    "a.eaf": (EAF, r"no table but an ELAN file\n  fix: pass its folder to the corpus subtitles"),
    "a.vtt": (b"WEBVTT\n\n", r"no table but a file of subtitles\n  fix: pass its folder to the corpus subtitles"),
    "a.xml": (b"<?xml version='1.0'?><rows/>", r"no table but XML\n  fix: save its rows as CSV or JSON lines"),
    "a.csv": (b"\n<!DOCTYPE html><html><body>Sign in", r"no table but a web page\n  fix: download the file itself"),
    "a.tsv": (parquet(), r"not text but a Parquet table\n  fix: name it NAME\.parquet"),
    "a.db": (b"SQLite format 3\0" + bytes(99), r"not text but an SQLite database\n  fix: export its table as CSV"),
    "a.pdf": (b"%PDF-1.7\n", r"not text but a PDF document\n  fix: copy its table"),
    "a.mp4": (b"\0\0\0\x20ftypisom", r"not text but a video\n  fix: pass the table that names the videos"),
}


@pytest.mark.parametrize("delimiter", ["", "tab"])
@pytest.mark.parametrize("name", KINDS)
def test_files_that_are_no_tables(tmp_path: Path, name: str, delimiter: str) -> None:
    content, said = KINDS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: {said}") as caught:
        make_corpus("table", {"table": str(tmp_path / name), "delimiter": delimiter})
    assert "iconv" not in str(caught.value) and "--delimiter" not in str(caught.value)


def test_lists_and_texts_are_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_bytes(WORKBOOK)
    with pytest.raises(DataError, match=r"ids\.txt: not text but a document of an office program"):
        list(read_lines(tmp_path / "ids.txt"))


@pytest.mark.parametrize(
    "text", ["PAR1 is a line", "PK is a line", "BZh", "%PD", "{}", "", "\ufeffWEBVTT ist Text", "\n<p"]
)
def test_plain_texts_are_none_of_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert "\n".join(line for _, line in read_lines(tmp_path / "a.txt")) == text.removeprefix("\ufeff")


def test_a_missing_table_is_called_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.xlsx: cannot be read \(No such file"):
        Table(table=tmp_path / "gone.xlsx")


def test_names_alone_give_the_advice_where_the_content_says_nothing(tmp_path: Path) -> None:
    """Tab-separated text under ``.xls`` is common; it is read when its delimiter is given."""
    (tmp_path / "a.xls").write_text("id\tmedia\ttext\n1\ta.mp4\tb\n")
    with pytest.raises(
        OptionError, match=r"for a spreadsheet: save it as CSV .*; for a table of this name add --delim"
    ):
        Table(table=tmp_path / "a.xls")
    (segment,) = Table(table=tmp_path / "a.xls", delimiter="tab").segments()
    assert segment.text == "b"
