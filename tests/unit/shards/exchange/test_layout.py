"""Sets of tars made elsewhere: which files are shards, which split they are, ids that start again in every tar."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from typer.testing import CliRunner

from shards.build.build import BuildOptions
from shards.cli.app import app
from shards.errors import DataError, OptionError
from shards.exchange.adopt import adopt
from shards.exchange.convert import ConvertOptions, convert
from shards.exchange.layout import TarSplits, name_splits, open_tars, repeating
from shards.format.annotations import parse_annotation
from shards.format.index import read_index
from shards.inspect.lint import lint
from shards.load.reader import Reader
from shards.order.plan import Plan, PlanOptions, Source
from tests.unit.shards.making import mp4, pictures

CLIPS = [mp4(pictures(6, seed=number)) for number in range(3)]


def write_tar(path: Path, names: list[str], clip: int = 0, json: str = "") -> Path:
    """A tar of clips with a text each in a .txt, or with this .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names, clip):
            other = (f"{name}.json", json.encode()) if json else (f"{name}.txt", f"satz {number}\n".encode())
            for member, payload in ((f"{name}.mp4", CLIPS[number]), other):
                info = tarfile.TarInfo(member)
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return path


def run(*words: object):  # type: ignore[no-untyped-def]
    environment = {"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, [str(word) for word in words], env=environment)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose name speaks of no split."""
    return tmp_path / "in"


class TestSplits:
    @pytest.mark.parametrize(
        ("name", "splits"),
        [
            *(
                (f"{name}.tar", {"test"})
                for name in ("test", "test_000", "Test-1", "phoenix-test-000000", "phoenixTest")
            ),
            *((f"{name}.tar", {"dev"}) for name in ("dev.0", "dev0", "VAL", "a_validation_3", "valset-1")),
            *((f"{name}.tar", {"train"}) for name in ("train-000000", "x.training.1", "my train 2")),
            ("eval.tar", {"eval"}),
            ("train-dev.tar", {"train", "dev"}),
            ("val_valid.tar", {"dev"}),
            *((f"{name}.tar", set()) for name in ("000000", "latest", "contest-1", "device", "trainer", "set", "")),
        ],
    )
    def test_words_of_a_name(self, name: str, splits: set[str]) -> None:
        assert name_splits(name) == splits

    @pytest.mark.parametrize("name", ["test", "test_000", "dev.0", "Test-1", "eval", "phoenix-test-000000"])
    def test_no_evaluation_tar_becomes_train(self, folder: Path, name: str) -> None:
        write_tar(folder / f"{name}.tar", ["a"])
        assert "train" not in adopt(folder).splits

    def test_a_name_that_leaves_it_open(self, folder: Path) -> None:
        write_tar(folder / "x.tar", ["a"])
        write_tar(folder / "val.tar", ["b"], 1)
        with pytest.raises(DataError, match=r"x\.tar: which split is this\? The name names no split, val\.tar does"):
            adopt(folder)
        (folder / "x.tar").rename(folder / "train_test.tar")
        with pytest.raises(DataError, match=r"(?s)The name speaks of test and train.*rename the tar .* --split NAME"):
            adopt(folder)
        assert adopt(folder, split="dev").splits == {"dev": 2}
        with pytest.raises(OptionError, match="'Dev 1' cannot be a split"):
            adopt(folder, split="Dev 1")

    def test_the_samples_own_split_needs_no_name(self, folder: Path) -> None:
        write_tar(folder / "x.tar", ["a"], json='{"text": "a", "split": "test_aligned"}')
        write_tar(folder / "val.tar", ["b"], 1)
        assert adopt(folder).splits == {"dev": 1, "test_aligned": 1}

    def test_nothing_names_a_split(self, folder: Path) -> None:
        write_tar(folder / "x.tar", ["a", "b"])
        notes: list[str] = []
        assert adopt(folder, on_note=notes.append).splits == {"train": 2}
        assert notes == ["nothing names a split: 2 samples are train; for another give --split NAME"]

    def test_the_folder_names_it(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "Test" / "000.tar", ["a"])
        notes: list[str] = []
        assert adopt(tmp_path / "Test", on_note=notes.append).splits == {"test": 1}
        assert notes == ["1 samples are test, for the folder is called so"]
        write_tar(tmp_path / "Test" / "dev.tar", ["b"], 1)
        assert TarSplits(["dev.tar"], "Test").of("dev.tar") == "dev"

    def test_convert(self, folder: Path, tmp_path: Path) -> None:
        write_tar(folder / "x.tar", ["a"])
        write_tar(folder / "phoenix_test.tar", ["b"], 1)
        options = ConvertOptions(folder, "wds", "mine")
        with pytest.raises(DataError, match=r"(?s)names no split, phoenix_test\.tar does.*--defaults split=NAME"):
            convert(options, tmp_path / "set", BuildOptions())
        result = run("convert", folder, "--out", tmp_path / "set", "--defaults", "split=dev", "--workers", 1)
        assert result.exit_code == 0 and "dev 1, test 1" in result.stdout, "a default is no override"
        (folder / "phoenix_test.tar").unlink()
        result = run("convert", folder, "--out", tmp_path / "again", "--workers", 1)
        assert "note: nothing names a split: 1 samples are train" in result.stderr and ": train 1;" in result.stdout


class TestFiles:
    @pytest.mark.parametrize("name", ["z.tar.gz", "z.TGZ", "z.tar.zst"])
    def test_compressed_tars(self, folder: Path, tmp_path: Path, name: str) -> None:
        write_tar(folder / "a.tar", ["a"])
        write_tar(folder / name, ["b"])
        with pytest.raises(DataError, match=rf"{name}: samples inside a compressed tar have no address"):
            adopt(folder)
        with pytest.raises(DataError, match="samples inside a compressed tar"):
            convert(ConvertOptions(folder, "wds", "mine"), tmp_path / "set", BuildOptions())
        with pytest.raises(DataError, match="samples inside a compressed tar"):
            open_tars(folder / name)

    def test_what_is_left_out_is_named(self, folder: Path, tmp_path: Path) -> None:
        write_tar(folder / "sub" / "b.tar", ["b"])
        with pytest.raises(DataError, match=r"no \*\.tar files; it holds sub/"):
            adopt(folder)
        write_tar(folder / "train.tar", ["a"])
        (folder / "c.zip").write_bytes(b"")
        (folder / ".hidden").write_bytes(b"")
        said = "note: left out, only the *.tar files of the folder itself are read: c.zip, sub/\n"
        for _ in range(2):  # the second time there are an index and a manifest
            assert said in run("index", folder).stderr
        assert said[:-1] in run("convert", folder, "--out", tmp_path / "set", "--workers", 1).stderr

    def test_missing_and_added(self, folder: Path) -> None:
        result = run("index", "/nosuch")
        assert result.exit_code == 4 and result.stderr.startswith("error: /nosuch: no such file or folder\n")
        path = write_tar(folder / "train-0.tar", ["a"])
        with pytest.raises(DataError, match=r"train-0\.tar: a single file, a set is a folder"):
            adopt(path)
        adopt(folder)
        write_tar(folder / "train-1.tar", ["b"], 1)
        with pytest.raises(DataError, match=r"train-1\.tar: not in the manifest"):
            adopt(folder)

    def test_urls(self, folder: Path, tmp_path: Path) -> None:
        path = write_tar(folder / "test.tar", ["a", "b"])
        fsspec.filesystem("memory").pipe_file("/foreign/in/test.tar", path.read_bytes())
        assert run("convert", "memory://foreign/in", "--out", tmp_path / "set", "--workers", 1).exit_code == 0
        assert read_index(tmp_path / "set").manifest.splits == {"test": 2}
        result = run("index", "memory://foreign/in")
        assert result.exit_code == 0 and "memory://foreign/in: 1 shards; test 2" in result.stdout, result.output
        assert "a.mp4" in run("index", "memory://foreign/in/test.tar").stdout
        for kind in ("lmdb", "mds"):
            result = run("convert", "memory://foreign/in", "--format", kind, "--out", tmp_path / kind)
            assert result.exit_code == 4 and f"--format {kind} cannot be read from a URL" in result.stderr

    def test_the_folder_above_names_the_corpus(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_tar(folder / "train.tar", ["a"])
        monkeypatch.chdir(folder)
        adopt(".")
        assert read_index(folder).row(0).corpus == "in"
        assert open_tars("train.tar")[1] == ["train.tar"]


class TestIds:
    @pytest.fixture
    def repeated(self, folder: Path) -> Path:
        write_tar(folder / "train-a.tar", ["000"])
        write_tar(folder / "train-b.tar", ["000", "001"], 1)
        return folder

    def test_they_get_the_tars_name(self, repeated: Path, tmp_path: Path) -> None:
        expected = ["train-a/000", "train-b/000", "train-b/001"]
        said = "note: ids of in occur in several tars ('000' in train-a.tar and train-b.tar): every id begins with"
        assert said in run("index", repeated).stderr
        assert [row.sample_id for row in read_index(repeated).rows()] == expected
        assert lint(repeated).ok
        assert said.replace(" in ", " set ", 1) in run("convert", repeated, "--out", tmp_path / "set").stderr
        assert [row.sample_id for row in read_index(tmp_path / "set").rows()] == expected

    def test_twice_in_a_tar(self, folder: Path) -> None:
        write_tar(folder / "train.tar", ["a", "b"], json='{"text": "x", "id": "7"}')
        with pytest.raises(DataError, match=r"train\.tar: the id '7' of in occurs twice in a tar"):
            adopt(folder)
        again = [("a.tar", "c", "1"), ("b.tar", "c", "1"), ("b.tar", "d", "1")]
        notes: list[str] = []
        assert repeating(again, notes.append) == {"c"}
        assert notes == [
            "ids of c occur in several tars ('1' in a.tar and b.tar): every id begins with its tar's name now, TAR/ID"
        ]
        with pytest.raises(DataError, match="occurs twice in a tar"):
            repeating([*again, ("b.tar", "c", "1")], notes.append)

    def test_rows_of_a_table(self, repeated: Path, tmp_path: Path) -> None:
        table = tmp_path / "t.tsv"
        options: dict[str, Any] = {"table": table}

        def converted(text: str) -> list[str]:
            table.write_text("id\ttext\n" + text)
            notes: list[str] = []
            convert(
                ConvertOptions(repeated, "wds", "x", **options), tmp_path / "set", BuildOptions(), 1, None, notes.append
            )
            return notes

        with pytest.raises(
            DataError, match=r"(?s)t\.tsv:2: the id '000' is that of train-a\.tar:000 and of train-b.*b/000"
        ):
            converted("000\teins\n001\tzwei\n")
        with pytest.raises(DataError, match=r"t\.tsv:4: the id '001' stands in line 2 already"):
            converted("001\teins\n000\tzwei\n001\tdrei\n")
        notes = converted("train-a/000\teins\ntrain-b/000\tzwei\n001\tdrei\nold\tvier\nolder\tfünf\n")
        assert notes[0] == f"{table}: 2 of 5 rows are no sample's: old, older"
        assert [row.text for row in read_index(tmp_path / "set").rows()] == ["eins", "zwei", "drei"]


def test_texts_are_annotations(folder: Path) -> None:
    write_tar(folder / "train.tar", ["a", "b"])
    adopt(folder)
    assert lint(folder).ok
    reader = Reader(Plan([Source(read_index(folder))], PlanOptions("clip")))
    assert [reader.meta(sample) for sample in range(2)] == [{"text": "satz 0"}, {"text": "satz 1"}]
    reader.close()


def test_fields_of_other_types_are_no_contradiction(folder: Path) -> None:
    write_tar(folder / "dev.tar", ["a"], json='{"text": "x", "signer": 7, "split": "", "gloss": null, "fps": 25}')
    adopt(folder)
    row = read_index(folder).row(0)
    assert (row.signer, row.split, row.gloss) == ("7", "dev", "") and lint(folder).ok


def test_a_contradiction_is_found(folder: Path) -> None:
    path = write_tar(folder / "dev.tar", ["a"], json='{"text": "x", "signer": 7, "frames": 9}')
    adopt(folder)
    problems = lint(folder).by_rule()
    assert path.is_file() and [problem.detail for problem in problems["meta"]] == [
        "frames is 9 in the annotation member, 6 in the index"
    ]


def test_what_is_no_annotation() -> None:
    assert parse_annotation(b' "quoted" \n', '"quoted"') == {"text": '"quoted"'}
    assert parse_annotation(b'{"a": 1}', "x") == {"a": 1}
    with pytest.raises(ValueError, match="holds int, not an object"):
        parse_annotation(b"12", "x")
    with pytest.raises(ValueError, match="cannot be parsed"):
        parse_annotation(b"\xff", "x")


def test_unusable_samples_may_be_allowed(folder: Path, tmp_path: Path) -> None:
    path = write_tar(folder / "train.tar", ["a", "b"])
    path.write_bytes(path.read_bytes().replace(b"satz 1", b"      "))
    words = ("convert", folder, "--workers", 1, "--out", tmp_path / "set")
    result = run(*words)
    assert result.exit_code == 4 and "raise --max-skipped-fraction" in result.stderr
    result = run(*words, "--max-skipped-fraction", 0.5)
    assert result.exit_code == 0 and "skipped 1" in result.stdout, result.output


def test_lint_names_tokens_of_texts_only(folder: Path) -> None:
    write_tar(folder / "train.tar", ["a"])
    adopt(folder)
    assert "1 shards, 1 samples, 0." in run("lint", folder, "--no-decode", "--workers", 1).stdout
