"""Text files of every format: compressed, in folders, damaged; what a document is; parallel files."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.build.build import BuildOptions, build
from shards.corpora import compressed, make_corpus
from shards.corpora.compressed import byte_lines, open_source, plain_suffix
from shards.corpora.parallel import Parallel
from shards.corpora.text import Text
from shards.corpora.text_base import TextBase
from shards.corpora.text_documents import arrow_rows, read_documents, value_at
from shards.corpora.text_files import Formats, check_split, find_files
from shards.errors import DataError, OptionError
from shards.filter.corpus import filtered
from shards.filter.options import FilterOptions
from shards.inspect.lint import lint
from tests.unit.shards.making import save_tokenizer


def texts(corpus: Any) -> list[str]:
    return [segment.text for segment in corpus.segments()]


def zstd(payload: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(payload)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


class TestCompressed:
    @pytest.mark.parametrize("suffix", PACK)
    def test_lines_are_those_of_the_plain_file(self, tmp_path: Path, suffix: str) -> None:
        plain = codecs.BOM_UTF8 + "erster satz\r\n\r\nzweiter Ünï\n".encode()
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(PACK[suffix](plain[:9]) + PACK[suffix](plain[9:]))  # two members or frames, as cat makes them
        assert plain_suffix(path) == ".txt" and plain_suffix(tmp_path / "a.tsv") == ".tsv"
        with open_source(path) as handle:
            assert handle.read() == plain
        assert texts(Text(paths={"train": str(path)})) == ["erster satz", "zweiter Ünï"]

    @pytest.mark.parametrize("suffix", PACK)
    def test_cut_and_damaged_files_are_refused(self, tmp_path: Path, suffix: str) -> None:
        lines = "".join(f"line {random.Random(n).random()}\n" for n in range(20_000)).encode()
        packed = PACK[suffix](lines)
        path = tmp_path / f"a.txt{suffix}"
        cases = [packed[: len(packed) // 2], b"no such format, but long enough to be one"]
        if suffix != ".zst":  # written here without checksums
            cases.append(bytes(packed[:40]) + b"\x00garbage" * 5 + bytes(packed[80:]))
        for broken in cases:
            path.write_bytes(broken)
            with pytest.raises(
                DataError, match=r"a\.txt\..*: cannot be read \(.+\)\n  fix: copy or fetch the file again"
            ):
                list(byte_lines(path))

    def test_missing_file(self, tmp_path: Path) -> None:
        for name in ("a.txt", "a.txt.gz", "a.txt.zst"):
            with pytest.raises(DataError, match=r"cannot be read \(.*[Nn]o such file.*\)\n  fix: check the path"):
                list(byte_lines(tmp_path / name))

    def test_one_long_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"short\n" + b"word " * 10_000_000 + b"\nlast\n")
        assert [len(line) for line in byte_lines(path)] == [6, 50_000_001, 5]
        monkeypatch.setattr(compressed, "LONGEST_LINE", 1 << 20)
        with pytest.raises(DataError, match="a line of more than 1 MiB\n  fix: put one document on a line"):
            list(byte_lines(path))


class TestFiles:
    def tree(self, root: Path) -> Path:
        for name in ("b/2.txt", "b/10.txt.gz", "a.jsonl", "_SUCCESS.txt", ".hidden/x.txt", "readme.md"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"")
        return root

    def test_folders_and_globs_are_sorted(self, tmp_path: Path) -> None:
        root = self.tree(tmp_path)
        formats = Formats((".txt", ".jsonl"))
        found = find_files({"train": str(root)}, formats, "here")
        assert [file.label for file in found] == ["a.jsonl", "b/10.txt.gz", "b/2.txt"]
        found = find_files({"train": f"{root}/**/*.txt*", "dev": [f"{root}/a.jsonl"]}, formats, "here")
        assert [(file.split, file.label) for file in found] == [
            ("train", "_SUCCESS.txt"), ("train", "b/10.txt.gz"), ("train", "b/2.txt"), ("dev", "a.jsonl"),
        ]  # fmt: skip
        (root / "odd[1].txt").write_text("x")
        assert len(find_files({"train": str(root / "odd[1].txt")}, formats, "here")) == 1

    def test_any_case_and_files_that_are_not_read(self, tmp_path: Path) -> None:
        for name in ("a.txt", "B.TXT", ".hidden.txt", "c.JSONL", "readme.md", "d.pdf", "e.doc", "f.doc"):
            (tmp_path / name).write_text('{"text": "x"}\n')
        (tmp_path / "g.TXT.GZ").write_bytes(gzip.compress(b"x\n"))
        corpus = Text(paths={"train": str(tmp_path), "dev": [str(tmp_path / "a.txt")]})
        assert [file.label for file in corpus.files] == ["B.TXT", "a.txt", "c.JSONL", "g.TXT.GZ", "a.txt"]
        assert texts(corpus)[2:4] == ["x", "x"]
        note = f"{tmp_path}: files of other types, not read (4): d.pdf, e.doc, f.doc, ..."
        assert corpus.notes == [note] and filtered(corpus, FilterOptions()).notes == [note]  # type: ignore[attr-defined]
        assert Text(paths={"train": str(tmp_path / "a.txt")}).notes == []

    def test_what_is_refused(self, tmp_path: Path) -> None:
        root = self.tree(tmp_path)
        formats = Formats((".npy", ""))
        with pytest.raises(DataError, match=r"holds no text files\n  fix: it needs \.npy, \(no suffix\); also \.gz"):
            find_files({"train": str(root)}, formats, "here")
        with pytest.raises(DataError, match="holds no text files"):
            find_files({"train": f"{root}/*.csv"}, formats, "here")
        with pytest.raises(DataError, match=r"readme\.md: unknown file type"):
            find_files({"train": f"{root}/*.md"}, formats, "here")
        with pytest.raises(DataError, match=r"two train files named 2\.txt\n  fix: rename one"):
            find_files({"train": [f"{root}/b/2.txt", f"{root}/c/2.txt"]}, Formats((".txt",)), "here")
        for split in ("Train", "a b", "", "a-b", "1st"):
            with pytest.raises(DataError, match=r"split .*\n  fix: use a plain lower-case word"):
                check_split(split, "here")
        check_split("test_aligned", "here")


class TestDocuments:
    def test_units_of_plain_text(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(codecs.BOM_UTF8 + b"\r\none\r\ntwo\r\n  \r\n\r\nthree\r\n")
        got = {unit: list(read_documents(path, ["text"], unit)) for unit in ("line", "paragraph", "file")}  # type: ignore[arg-type]
        assert got["line"] == [(2, ["one"]), (3, ["two"]), (6, ["three"])]
        assert got["paragraph"] == [(2, ["one\ntwo"]), (6, ["three"])]
        assert got["file"] == [(1, ["\none\ntwo\n  \n\nthree"])]
        assert texts(Text(paths={"train": str(path)}, unit="paragraph")) == ["one\ntwo", "three"]
        path.write_bytes(b"\n \n")
        assert all(list(read_documents(path, ["text"], unit)) == [] for unit in ("line", "paragraph", "file"))  # type: ignore[arg-type]
        with pytest.raises(DataError, match="unit 'word'\n  fix: use one of line, paragraph, file"):
            Text(paths={"train": str(path)}, unit="word")

    def test_a_unit_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from shards.corpora import text_documents

        monkeypatch.setattr(text_documents, "LONGEST_LINE", 1 << 20)
        path = tmp_path / "a.txt"
        path.write_text("word\n" * 300_000)
        with pytest.raises(DataError, match=r"a\.txt:1: a paragraph of more than 1 MiB\n  fix: choose a smaller unit"):
            list(read_documents(path, ["text"], "paragraph"))

    def test_fields_within_fields(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl.gz"
        rows: list[dict[str, Any]] = [{"t": {"de": "satz", "en": None}}, {"t": None}, {"t": {"de": 7, "en": "x"}}]
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        assert texts(Text(paths={"train": str(path)}, text="t.de")) == ["satz", "", "7"]
        with pytest.raises(DataError, match=r"a\.jsonl\.gz:1: no field 't\.fr': 'fr' is not in \['de', 'en'\]"):
            list(read_documents(path, ["t.fr"]))
        with pytest.raises(DataError, match=r"no field 'a\.b': 'b' is not in str"):
            value_at({"a": "x"}, "a.b", "here")
        assert value_at({"a.b": 1}, "a.b", "here") == 1
        with pytest.raises(DataError, match="a document is a dict, not text\n  fix: name the field inside it"):
            texts(Text(paths={"train": str(path)}, text="t"))

    def test_table_with_long_quoted_fields(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text('text,n\n"' + "word " * 60_000 + '",1\n')
        assert [len(text) for text in texts(Text(paths={"train": str(path)}))] == [299_999]

    def test_tables_without_a_header(self, tmp_path: Path) -> None:
        (tmp_path / "a.tsv").write_text("IX GO\tI go.\nIX SEE\tI see.\n")
        corpus = make_corpus("text", {"paths": f"train={tmp_path}/a.tsv", "columns": "gloss,text"})
        assert [(s.text, s.origin.rpartition(":")[2]) for s in corpus.segments()] == [("I go.", "1"), ("I see.", "2")]
        with pytest.raises(DataError, match=r"no column 'text'; .*\n  fix: .* name them: --columns NAME,NAME"):
            list(make_corpus("text", {"paths": f"train={tmp_path}/a.tsv"}).segments())

    def test_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        table = pa.table({"text": [f"doc {n}" for n in range(5000)] + [None], "t": [{"de": "x", "en": "y"}] * 5001})
        pq.write_table(table, path, row_group_size=700)
        segments = list(Text(paths={"train": str(path)}, text="text").segments())
        assert len(segments) == 5001 and segments[4999].text == "doc 4999" and segments[5000].text == ""
        assert segments[4999].origin == f"{path}:5000" and segments[4999].id == "train/a.parquet:5000#0.0"
        assert texts(Text(paths={"train": str(path)}, text="t.de"))[0] == "x"
        with pytest.raises(DataError, match=r"no column 'txt'; there are \['text', 't'\]\n  fix: map the field names"):
            texts(Text(paths={"train": str(path)}, text="txt"))
        whole = path.read_bytes()
        for broken in (whole[: len(whole) // 2], b"PAR1" + b"\0" * 50, b""):
            path.write_bytes(broken)
            with pytest.raises(DataError, match=r"a\.parquet: not a parquet file \(.*\)\n  fix: fetch or write"):
                texts(Text(paths={"train": str(path)}))
        path.write_bytes(whole[:4] + b"\x7f" * 3000 + whole[3004:])
        with pytest.raises(DataError, match=r"a\.parquet: (unreadable after row \d+|not a parquet file)"):
            texts(Text(paths={"train": str(path)}))

    def test_arrow_text_that_is_not_utf8(self) -> None:
        offsets = pa.py_buffer(b"\0\0\0\0\2\0\0\0")
        bad = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
        with pytest.raises(DataError, match="here: unreadable after row 0"):
            list(arrow_rows([pa.record_batch([bad], ["text"])], ["text"], "here"))

    @given(st.binary(max_size=400), st.sampled_from([".txt", ".jsonl", ".csv", ".parquet", ".txt.gz", ".jsonl.zst"]))
    def test_any_bytes_give_documents_or_a_data_error(self, tmp_path_factory: Any, payload: bytes, suffix: str) -> None:
        path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
        path.write_bytes(payload)
        try:
            assert all(isinstance(number, int) for number, _ in read_documents(path, ["text"], "paragraph"))
        except DataError as error:
            assert path.name in str(error)

    def test_flipped_bytes_give_documents_or_a_data_error(self, tmp_path: Path) -> None:
        rng = random.Random(5)
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": [f"doc {n}" for n in range(300)]}), path, row_group_size=100)
        originals = {path: path.read_bytes()}
        for suffix, pack in PACK.items():
            originals[tmp_path / f"a.jsonl{suffix}"] = pack(b'{"text": "x y z"}\n' * 500)
        for target, whole in originals.items():
            for _ in range(60):
                broken = bytearray(whole)
                for _ in range(rng.randint(1, 4)):
                    broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
                target.write_bytes(broken)
                try:
                    list(read_documents(target, ["text"]))
                except DataError as error:
                    assert target.name in str(error)


class TestParallel:
    def files(self, root: Path, sentences: bytes, glosses: bytes) -> dict[str, Any]:
        (root / "train.en").write_bytes(sentences)
        (root / "train.asl.gz").write_bytes(gzip.compress(glosses))
        return {"text": {"train": str(root / "train.en")}, "gloss": {"train": str(root / "train.asl.gz")}}

    def test_aligned_lines(self, tmp_path: Path) -> None:
        files = self.files(tmp_path, b"the rain comes\r\n\r\nwind\n", b"RAIN COME\nX\nWIND\n")
        corpus = Parallel(**files, templates=["{gloss} = {text}", "{text}"], corpus="aslg")
        assert texts(corpus) == ["RAIN COME = the rain comes", "the rain comes", "", "", "WIND = wind", "wind"]
        assert next(iter(corpus.segments())).id == "train/train.en:1#0.0" and corpus.settings["gloss"] == "annotated"
        flat = {key: f"train={value['train']}" for key, value in files.items()}
        assert texts(make_corpus("parallel", flat)) == [
            "signs: RAIN COME sentence: the rain comes", "", "signs: WIND sentence: wind",
        ]  # fmt: skip
        with pytest.raises(
            OptionError, match=r"there are glosses, but no template uses them: \['\{text\}'\]\n  fix: add --templ"
        ):
            Parallel(**files, templates=["{text}"])
        options = BuildOptions(tokenizer=save_tokenizer(tmp_path / "t"), max_skipped_fraction=0.5)
        manifest = build(Parallel(**files), tmp_path / "set", options)
        assert manifest.counts == {"samples": 2, "skipped": 1, "skipped/empty_text": 1} and lint(tmp_path / "set").ok

    def test_files_that_do_not_fit(self, tmp_path: Path) -> None:
        options = self.files(tmp_path, b"a\nb\n", b"A\n")
        with pytest.raises(DataError, match=r"train\.asl\.gz: ends before line 2, the other file goes on"):
            texts(Parallel(**options))
        options = self.files(tmp_path, b"a\n", b"A\nB\nC\n")
        with pytest.raises(DataError, match=r"train\.en: ends before line 2, the other file goes on"):
            texts(Parallel(**options))
        with pytest.raises(DataError, match=r"splits of text \['dev'\] and gloss \['train'\] differ"):
            Parallel(text={"dev": "x"}, gloss=options["gloss"])
        with pytest.raises(DataError, match="split 'Train A'"):
            Parallel(text={"Train A": "x"}, gloss={"Train A": "y"})


def test_options_of_every_text_corpus() -> None:
    class Bare(TextBase):
        pass

    bare = Bare(templates=["{text}"], passes=0)
    with pytest.raises(DataError, match="templates, repeat_max and passes must be >= 1"):
        bare.prepare(False)
