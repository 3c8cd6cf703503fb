"""How a rank ends: its exit note, and what happens when the run directory cannot take one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load_recipe
from pipeline.config.recipe_file import RecipeFile
from pipeline.config.resolve import resolve
from pipeline.dist import Ranks
from pipeline.engine import run
from pipeline.engine.phases import Phases
from pipeline.engine.signals import StopFlag
from pipeline.errors import StorageError


@contextlib.contextmanager
def unguarded(run_dir: Path) -> Iterator[None]:
    yield


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return []


def main(monkeypatch: pytest.MonkeyPatch, told: list[dict[str, Any]], run_dir: Path, ends: Any) -> int:
    """`run.main` with a training that ends as told; a hard exit is an exception here."""

    def train(*_: object) -> tuple[int, str]:
        if isinstance(ends, BaseException):
            raise ends
        return ends  # type: ignore[no-any-return]

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "read_on_all_ranks", lambda file, ranks: None)
    monkeypatch.setattr(run.dist, "init", lambda: Ranks(0, 0, 1))
    monkeypatch.setattr(os, "_exit", leave)
    given = RecipeFile(run_dir / "recipe.resolved.yaml", "0" * 64)
    return run.main(given, StopFlag(), run.Launcher(lambda note: told.append(note) is None, unguarded))


def test_a_stopped_run_says_where_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[dict[str, Any]]
) -> None:
    assert main(monkeypatch, told, tmp_path, (75, "saved at step 12")) == 75
    note = {"rank": 0, "code": 75, "error": "", "stopped": "saved at step 12"}
    assert told[0].keys() - note.keys() == {"step", "host", "time"} and told[0].items() >= note.items()
    assert json.loads((tmp_path / "logs" / "exit-rank-0.json").read_text()) == told[0]


def test_a_full_run_directory_takes_no_note_and_the_launcher_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(run, "write_atomic", full)
    with pytest.raises(SystemExit) as end:
        main(monkeypatch, told, tmp_path, StorageError("metrics.jsonl could not be written"))
    assert end.value.code == 2
    note = {"rank": 0, "code": 2, "error": "metrics.jsonl could not be written", "stopped": ""}
    assert told[0].items() >= note.items()
    assert "exit-rank-0.json could not be written: No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_log_that_cannot_grow_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run._RankLog(tmp_path / "rank-0.log")

    class Full:
        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        flush = close = lambda self: None

    log.stream.close()
    log.stream = Full()  # type: ignore[assignment]
    record = logging.LogRecord("x", logging.INFO, "x", 1, "text", None, None)
    log.handle(record)
    log.handle(record)
    log.close()
    assert capsys.readouterr().err == (
        f"{tmp_path / 'rank-0.log'} could not be written: No space left on device; this log has a gap\n"
    )


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    resolved = resolve(load_recipe("demo_contrastive", [f"run_dir={tmp_path / 'run'}"]), 1)
    with pytest.raises(StorageError, match=r"/run/logs could not be written: Not a directory; free space or change"):
        run.train(resolved, Ranks(0, 0, 1), StopFlag(), Phases())
