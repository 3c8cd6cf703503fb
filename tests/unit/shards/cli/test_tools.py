"""`slt shards lint, stats, preview, split, head, convert`: output, files, exit codes."""

from __future__ import annotations

import csv
import json
import threading
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shards.build.build import BuildOptions, build
from shards.cli import tools
from shards.cli.app import app
from shards.format.index import fingerprint, read_index, rows_to_table, write_index
from tests.unit.shards.making import save_tokenizer, text_corpus, video_corpus

runner = CliRunner()


def run(*words: object):  # type: ignore[no-untyped-def]
    environment = {"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}
    return runner.invoke(app, [str(word) for word in words], env=environment)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tools") / "set"
    build(video_corpus(tmp_path_factory.mktemp("videos"), 3), out, BuildOptions())
    return out


@pytest.fixture
def doubtful(built: Path, tmp_path: Path) -> Path:
    """The set with an index that warns, but has no error."""
    for path in built.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard_set = read_index(built)
    rows = [row._replace(duration_seconds=0.01) for row in shard_set.rows()]
    table = rows_to_table(rows)
    shard_set.manifest.fingerprint = fingerprint(shard_set.manifest.shards, table)
    write_index(tmp_path, table, shard_set.manifest)
    return tmp_path


def test_lint_shows_rules_with_examples(doubtful: Path, tmp_path: Path) -> None:
    result = run("lint", doubtful, "--workers", 1, "--csv", tmp_path / "problems.csv")
    assert result.exit_code == 0 and "0 errors, 3 warnings; 1 shards, 3 samples" in result.stdout
    assert "text_too_long" in result.stdout and "more text than anyone signs in that time" in result.stdout
    rows = list(csv.DictReader((tmp_path / "problems.csv").read_text().splitlines()))
    assert len(rows) == 3 and rows[0]["severity"] == "warning" and rows[0]["rule"] == "text_too_long"


def test_strict_lint_fails_on_warnings(doubtful: Path) -> None:
    assert run("lint", doubtful, "--workers", 1, "--strict", "--no-decode").exit_code == 4
    report = json.loads(run("lint", doubtful, "--workers", 1, "--json").stdout)
    assert (report["errors"], report["rules"], report["ok"]) == (0, {"text_too_long": 3}, True)


def test_lint_of_a_text_set(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    build(text_corpus(5), tmp_path / "set", BuildOptions(tokenizer=tokenizer))
    result = run("lint", tmp_path / "set", "--tokenizer", tokenizer, "--workers", 1)
    assert result.exit_code == 0 and "ok; 1 shards, 5 samples" in result.stdout
    assert run("lint", tmp_path / "set", "--tokenizer", tmp_path / "gone", "--workers", 1).exit_code == 4


def test_stats_and_plots(built: Path, tmp_path: Path) -> None:
    result = run("stats", built, "--plots", tmp_path / "plots")
    assert result.exit_code == 0 and (tmp_path / "plots" / "index.html").is_file()
    for part in ("vocabulary", "frames per second: 25 (3)", "pixels: 64x48 (3)", "signers: 1", "random order"):
        assert part in result.stdout
    assert json.loads(run("stats", built, "--json").stdout)["sizes"] == {"64x48": 3}


def test_plots_without_matplotlib(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("stats", built, "--plots", tmp_path / "plots")
    assert result.exit_code == 2 and not (tmp_path / "plots").exists()
    assert "charts need matplotlib, which is not installed" in result.output
    assert "pip install 'llava-slt[plots]'" in result.output


def test_preview_serves_until_interrupted(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers while the verb runs; Ctrl-C ends it with exit code 0."""
    from shards.inspect.preview import PreviewServer

    answers: list[bytes] = []

    def serve_once(self: PreviewServer) -> None:
        thread = threading.Thread(target=self.handle_request)
        thread.start()
        with urllib.request.urlopen(f"{self.url}api/summary", timeout=10) as response:
            answers.append(response.read())
        thread.join(timeout=10)
        raise KeyboardInterrupt

    launched: list[str] = []
    monkeypatch.setattr(PreviewServer, "serve_forever", serve_once)
    monkeypatch.setattr(tools.typer, "launch", launched.append)
    result = run("preview", built, "--port", 0, "--open")
    assert result.exit_code == 0 and "stop with Ctrl-C" in result.stdout and result.stdout.endswith("stopped\n")
    assert json.loads(answers[0])["samples"] == 3 and launched[0].startswith("http://127.0.0.1:")


def test_head_and_split(built: Path, tmp_path: Path) -> None:
    result = run("head", built, "--out", tmp_path / "head", "--samples", 2)
    assert result.exit_code == 0 and "train 2; fingerprint" in result.stdout
    words = ("--fractions", "train=0.67,dev=0.33", "--group", "text", "--seed", 3)
    result = run("split", built, "--out", tmp_path / "split", *words)
    assert result.exit_code == 0 and "dev 1, train 2;" in result.stdout
    assert read_index(tmp_path / "split").manifest.options["derived"]["seed"] == 3
    for fractions, message in (
        ("train", "'train' is not key=value"),
        ("train=x", "--fractions train: 'x' is not a number"),
    ):
        result = run("split", built, "--out", tmp_path / "again", "--fractions", fractions)
        assert result.exit_code == 2 and message in result.stderr


def test_convert(built: Path, tmp_path: Path) -> None:
    words = ("--format", "wds", "--store", "short_side=32", "--workers", 1, "--defaults", "language=de")
    result = run("convert", built, "--out", tmp_path / "set", *words)
    assert result.exit_code == 0 and "train 3; samples 3" in result.stdout
    row = read_index(tmp_path / "set").row(0)
    assert (row.height, row.text, row.sample_id, row.corpus) == (32, "satz nummer 0", "clip.0", "set")


@pytest.mark.parametrize("verb", ["lint", "stats", "preview", "split", "head", "convert"])
def test_help_ends_with_an_example(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0 and f"Example: slt shards {verb}" in result.stdout


@pytest.mark.parametrize("verb", ["lint", "stats", "preview"])
def test_missing_sets(verb: str, tmp_path: Path) -> None:
    result = run(verb, tmp_path)
    assert result.exit_code == 4 and result.stderr.startswith(f"error: {tmp_path}: no manifest.json: not a shard set")


def test_texts_keeps_a_column_beside_the_set_and_lists_it(built: Path, tmp_path: Path) -> None:
    keys = read_index(built).table["sample_id"].to_pylist()
    table = tmp_path / "said.csv"
    table.write_text(f'name,text\n{keys[1]},"one, two"\n{keys[1]},three\n')
    words = ("texts", built, "said", "--table", table, "--columns", "id=name")
    assert "said: 2 texts of 1 of 3 samples, at most 2 of one; fingerprint" in run(*words).stdout
    assert run("texts", built).stdout.startswith(f"{built}: said: 2 texts")
    assert run(*words).exit_code == 2 and "said: 2 texts" in run(*words, "--replace").stdout
    copy = tmp_path / "copy"
    run("head", built, "--out", copy, "--samples", 2)
    assert "said: 2 texts of 1 of 2 samples" in run("texts", copy, "said", "--from-set", built).stdout
    (built / "column-said.arrow").unlink()


def test_texts_names_a_wrong_option(built: Path, tmp_path: Path) -> None:
    both = run("texts", built, "said")
    assert both.exit_code == 2 and "give one of --table and --from-set" in both.stderr
    unknown = run("texts", built, "said", "--table", tmp_path / "a.tsv", "--columns", "key=name")
    assert unknown.exit_code == 2 and "unknown 'key'" in unknown.stderr and "known: id, score, text" in unknown.stderr


def test_previous_and_pseudo_gloss_keep_columns(built: Path, tmp_path: Path) -> None:
    keys = read_index(built).table["sample_id"].to_pylist()
    table = tmp_path / "times.tsv"
    table.write_text("name\tvideo\tstart\n" + "".join(f"{key}\tv\t{n}\n" for n, key in enumerate(keys)))
    said = run("previous", built, "--table", table, "--columns", "id=name", "--count", 2).stdout
    assert "previous: 3 texts of 2 of 3 samples, at most 2 of one" in said
    assert run("previous", built).exit_code == 2
    words = ("pseudo-gloss", built, "--max-share", 1, "--tags", "noun")
    said = run(*words).stdout
    assert "words of 3 texts kept" in said and "most frequent:" in said
    figures = json.loads(run(*words, "--replace", "--json", "--model", "de=x").stdout)
    assert next(iter(figures.values()))["texts"] == 3
    drop = tmp_path / "drop.txt"
    drop.write_text("\n".join(next(iter(figures.values()))["frequent"]) + "\n")
    dropped = json.loads(run(*words, "--drop", drop, "--name", "fewer", "--json").stdout)
    assert next(iter(dropped.values()))["kept"] < next(iter(figures.values()))["kept"]
    for path in built.glob("column-*.arrow"):
        path.unlink()
