"""`slt shards`: every verb, its exit codes, one-paragraph errors, plain progress, help that ends with an example."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from shards.build.layout import BuildOptions
from shards.cli.app import app
from shards.cli.build import BuildSettings, build_options
from shards.cli.progress import progress
from shards.format.index import read_index
from tests.unit.shards.making import mp4, pictures, save_tokenizer

runner = CliRunner()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    lines = ["id\tvideo\tsatz"]
    for number in range(5):
        (folder / f"v{number}.mp4").write_bytes(mp4(pictures(8, seed=number)))
        lines.append(f"s{number}\tv{number}.mp4\tsatz nummer {number}")
    (folder / "t.tsv").write_text("\n".join(lines) + "\n")
    return folder / "t.tsv"


@pytest.fixture(scope="module")
def built(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "set"
    result = run(
        "build", "table", "--table", table, "--media=video", "--text", "satz", "--option", "language=sk", "--out", out
    )
    assert result.exit_code == 0, result.output
    assert "1 shards" in result.stdout and "samples: train 5; skipped: 0" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines() if str(out) not in line)
    assert re.search(r"build set: 5/5 [\d.]+/s, 0 s left train-000000\.tar skipped 0", result.stderr)
    return out


def run(*words: object):  # type: ignore[no-untyped-def]
    return runner.invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_build_table(built: Path) -> None:
    rows = list(read_index(built).rows())
    assert [row.text for row in rows] == [f"satz nummer {number}" for number in range(5)]
    assert {row.language for row in rows} == {"sk"}


def test_build_again_returns_at_once(built: Path, table: Path) -> None:
    again = run(
        "build", "table", "--table", table, "--media", "video", "--text", "satz", "--language", "sk", "--out", built
    )
    assert again.exit_code == 0


def test_storage_options(table: Path, tmp_path: Path) -> None:
    store = ("--store", "short_side=32", "--store", "samples_per_shard=2", "--store", "keep_ready=false")
    corpus = ("--table", table, "--media", "video", "--text", "satz")
    assert run("build", "table", *corpus, *store, "--workers", 1, "--out", tmp_path / "s").exit_code == 0
    shard_set = read_index(tmp_path / "s")
    assert len(shard_set.manifest.shards) == 3 and shard_set.row(0).height == 32


def test_build_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the rain\nthe wind comes\n")
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    text = ("--paths", f"train={tmp_path}/a.txt", "--templates", '["{text}", "say, {text}"]', "--workers", 1)
    result = run("build", "text", *text, "--tokenizer", tokenizer, "--out", tmp_path / "s")
    assert result.exit_code == 0, result.output
    assert [row.tokens for row in read_index(tmp_path / "s").rows()] == [4, 6, 5, 7]
    assert read_index(tmp_path / "s").manifest.options["templates"] == ["{text}", "say, {text}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build", "phoenix14"), "error: corpus: unknown corpus 'phoenix14'\n  fix: did you mean phoenix14t?"),
        (
            ("build", "table", "--tables", "x"),
            "error: corpus table: unknown option 'tables'\n  fix: did you mean table?",
        ),
        (("build", "table", "--table"), "error: corpus options: cannot read '--table'\n  fix: write --key value"),
        (("build", "table", "--option", "table"), "error: --option: 'table' is not key=value"),
        (("build", "table", "--table", "a", "--table=b"), "error: corpus options: table is given twice: 'a' and 'b'"),
        (("build", "table", "--id", "a", "--option", "id=b"), "error: corpus options: id is given twice: 'a' and 'b'"),
        (("build", "text", "--paths", "t=a,t=b"), "error: corpus text: paths: t is given twice: 'a' and 'b'"),
        (
            ("build", "text", "--paths", "news/"),
            "error: corpus text: paths: 'news/' is not key=value\n  fix: write key=value,key=value, or as JSON "
            '{"key": ["value", "value"]} (Split -> file, folder, glob, or list of them: ``train=a.txt,dev=b.txt``.)',
        ),
        (("build", "table", "--table", "t.tsv", "--engine", "x"), "error: --engine: unknown engine 'x'"),
        (("build", "table", "--table", "t.tsv", "--part", "x"), "error: --part: 'x' is no share"),
        (
            ("build", "table", "--table", "t.tsv", "--filter", "min_words=3", "--filter", "min_words=9"),
            "error: --filter: min_words is given twice: '3' and '9'\n  fix: give it once",
        ),
        (
            ("build", "table", "--table", "t.tsv", "--filter", "min_word=3"),
            "error: --filter: unknown option 'min_word'\n  fix: did you mean min_words? known: ",
        ),
    ],
)
def test_option_errors(words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.tsv").write_text("id\tmedia\ttext\n")
    monkeypatch.chdir(tmp_path)
    result = run(words[0], words[1], "--out", tmp_path / "s", *words[2:])
    assert result.exit_code == 2 and result.stderr.startswith(message), result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_data_errors(tmp_path: Path) -> None:
    result = run("build", "table", "--table", tmp_path / "gone.tsv", "--out", tmp_path / "s")
    assert result.exit_code == 4 and result.stderr.startswith(f"error: {tmp_path}/gone.tsv: cannot be read")


def test_storage_errors(table: Path, tmp_path: Path) -> None:
    for value, code, message in (
        ("shortside=3", 2, "--store: unknown option 'shortside'\n  fix: did you mean short_side? known: "),
        ("crf=x", 2, "'x' is not a whole number"),
        ("samples_per_shard=0", 2, "shard and member sizes must be >= 1"),
        ("crf=99", 2, "crf 99: 0..51"),
    ):
        result = run("build", "table", "--table", table, "--store", value, "--out", tmp_path / "s")
        assert result.exit_code == code and message in result.stderr
    (tmp_path / "mine").write_text("x")
    result = run("build", "table", "--table", table, "--media", "video", "--text", "satz", "--out", tmp_path)
    assert result.exit_code == 2 and "not empty and not a shard set" in result.stderr


def test_too_many_skips(table: Path, tmp_path: Path) -> None:
    corpus = ("--table", table, "--media", "video", "--text", "satz", "--media-root", tmp_path)
    result = run("build", "table", *corpus, "--out", tmp_path / "s", "--workers", 1)
    assert result.exit_code == 4 and "5 of 5 segments cannot be used (missing_media 5)" in result.stderr


def test_lint(built: Path, tmp_path: Path) -> None:
    result = run("lint", built, "--workers", 1)
    assert result.exit_code == 0 and "ok; 1 shards, 5 samples, 40 frames" in result.stdout
    assert json.loads(run("lint", built, "--json", "--workers", 1, "--no-decode").stdout)["ok"] is True
    for path in built.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    row = read_index(built).row(1)
    blob = bytearray((tmp_path / row.shard).read_bytes())
    blob[row.offset + 200] ^= 1
    (tmp_path / row.shard).write_bytes(blob)
    result = run("lint", tmp_path, "--workers", 1)
    assert result.exit_code == 4 and f"{row.shard}:{row.key}  bytes" in result.stdout
    report = json.loads(run("lint", tmp_path, "--json", "--workers", 1).stdout)
    assert report["ok"] is False and row.key in [problem["key"] for problem in report["problems"]]
    assert run("lint", tmp_path / "gone").exit_code == 4


def test_index(built: Path, tmp_path: Path) -> None:
    tar = built / "train-000000.tar"
    row = read_index(built).row(0)
    assert f"{row.offset:>12}" in run("index", tar).stdout
    members = json.loads(run("index", tar, "--json").stdout)
    assert [member["name"] for member in members][:2] == ["s0.mp4", "s0.json"] and members[0]["crc32"] == row.crc32
    (tmp_path / tar.name).write_bytes(tar.read_bytes())
    assert "1 shards; train 5" in run("index", tmp_path).stdout
    assert json.loads(run("index", tmp_path, "--json").stdout)["splits"] == {"train": 5}
    (tmp_path / tar.name).write_bytes(tar.read_bytes()[:-11000])
    result = run("index", tmp_path / tar.name)
    assert result.exit_code == 4 and "truncated" in result.stderr


def test_stats(built: Path) -> None:
    result = run("stats", built)
    assert result.exit_code == 0 and "table" in result.stdout and "8/8/8" in result.stdout
    assert json.loads(run("stats", built, "--json").stdout)["groups"][0]["samples"] == 5


def test_corpora() -> None:
    names = run("corpora").stdout.split()
    assert names == sorted(names) == json.loads(run("corpora", "--json").stdout)
    assert {"phoenix14t", "synthetic", "table", "text"} <= set(names)
    result = run("corpora", "table")
    assert "--media-root  Path | None, default None" in result.stdout and "--table  Path, required" in result.stdout
    assert "--templates  list[str], optional" in run("corpora", "text").stdout
    assert "      Words left out of pseudo glosses" in run("corpora", "text").stdout
    assert run("corpora", "tabel").exit_code == 2


def test_corpora_reports_without_building(table: Path, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text(table.read_text() + "s9\tgone.mp4\t\n")
    words = ("--table", tmp_path / "t.tsv", "--media-root", table.parent, "--media", "video", "--text", "satz")
    lines = run("corpora", "table", *words, "--missing", tmp_path / "missing").stdout.splitlines()
    assert dict(re.split("  +", line) for line in lines)["usable"] == "5"
    assert (tmp_path / "missing" / "missing.txt").read_text() == f"{table.parent}/gone.mp4\n"
    twice = (tmp_path / "t.tsv").read_text().replace("s9", "s1")
    (tmp_path / "twice.tsv").write_text(twice)
    result = run("corpora", "table", "--table", tmp_path / "twice.tsv", *words[2:])
    assert result.exit_code == 4 and f"fault: {tmp_path}/twice.tsv:7: the id 's1' occurs twice, first" in result.stdout
    report = json.loads(run("corpora", "table", *words, "--filter", "min_words=9", "--json").stdout)
    assert sum(report["splits"]["train"]["excluded"].values()) >= 5


def test_parts_merge_and_json(table: Path, tmp_path: Path) -> None:
    corpus = ("--table", table, "--media", "video", "--text", "satz", "--store", "samples_per_shard=2")
    out = ("--out", tmp_path / "s", "--workers", 1)
    result = run("build", "table", *corpus, *out, "--part", "1/2")
    assert result.exit_code == 0 and "part 1/2 is done, 2 shards; --merge" in result.stdout
    result = run("build", "table", *corpus, *out, "--merge")
    assert result.exit_code == 4 and "1 shards are missing (train-000001.tar); part 2/2" in result.stderr
    assert json.loads(run("build", "table", *corpus, *out, "--part", "2/2", "--json").stdout)["shards"] == 1
    result = run("build", "table", *corpus, *out, "--part", "2/2", "--merge")
    assert result.exit_code == 2 and "--part and --merge exclude each other" in result.stderr
    summary = json.loads(run("build", "table", *corpus, *out, "--merge", "--json").stdout)
    assert (summary["shards"], summary["counts"]) == (3, {"samples": 5, "skipped": 0})
    result = run("build", "table", *corpus, *out, "--part", "1/2")
    assert result.stdout == f"{tmp_path / 's'}: finished already, nothing to do for part 1/2\n"
    assert json.loads(run("build", "table", *corpus, *out, "--part", "1/2", "--json").stdout)["finished"] is True
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    assert report == summary["report"] and report["splits"]["train"]["built"] == 5


def test_filters_and_an_object_store(table: Path, tmp_path: Path) -> None:
    lines = table.read_text().splitlines()
    (tmp_path / "t.tsv").write_text("\n".join([*lines, "s9\tv0.mp4\tkurz"]) + "\n")
    corpus = ("--table", tmp_path / "t.tsv", "--media-root", table.parent, "--media", "video", "--text", "satz")
    out = ("--out", "memory://cli/set", "--scratch", tmp_path / "scratch", "--workers", 1)
    result = run("build", "table", *corpus, *out, "--filter", "min_words=2")
    assert result.exit_code == 0, result.output
    assert "samples: train 5; skipped: 0" in result.stdout and "train: excluded/too_short 1" in result.stdout
    assert "too_short" in fsspec.filesystem("memory").cat_file("/cli/set/report.json").decode()
    result = run("build", "table", *corpus, *out, "--filter", "words=2")
    assert result.exit_code == 2 and "--filter: unknown option 'words'\n  fix: " in result.stderr


@pytest.mark.parametrize("verb", ["build", "corpora", "index", "lint", "stats"])
def test_help_ends_with_an_example(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Example: slt shards {verb} \S+.*$", result.stdout.strip().splitlines()[-1]), result.stdout


def test_terminal_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress("build x") as show:
        show(2, 10, "train-000000.tar", 2)
        show(3, 10, "train-000000.tar", 2)
        show(10, 10, "train-000001.tar")
    assert "10/10" in capsys.readouterr().err


def test_defaults_are_the_documented_ones() -> None:
    assert build_options(BuildSettings()) == BuildOptions()
