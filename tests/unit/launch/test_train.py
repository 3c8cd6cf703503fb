"""What a rank makes of its command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import lock, notes
from launch.train import parse, run_rank
from pipeline.config.recipe_file import RecipeFile
from pipeline.engine import run
from pipeline.engine.recipe import Unresolved


def test_settings_are_those_of_the_launchers_file(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse(["runs/x/recipe.resolved.yaml", "--sha256", "ab"])
    assert (options.recipe, options.sha256, options.sets) == ("runs/x/recipe.resolved.yaml", "ab", [])
    assert parse(["demo", "--set", "seed=1", "--set", "train.steps=2"]).sets == ["seed=1", "train.steps=2"]
    with pytest.raises(SystemExit):
        parse(["runs/x/recipe.resolved.yaml", "--sha256", "ab", "--set", "seed=1"])
    assert "--set cannot be combined with --sha256: the launcher has resolved the recipe" in capsys.readouterr().err


def test_an_error_before_training_is_told_as_a_bug(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Such as a package that one host lacks: without a report it would look like a fault of the host."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(notes.LAUNCH_ID, "x")
    monkeypatch.setitem(sys.modules, "pipeline.engine.run", None)
    with pytest.raises(ImportError):
        run_rank("demo", [])
    _, report = notes.read(capfd.readouterr().err.strip().splitlines()[-1])
    assert report is not None and (report["rank"], report["code"]) == (1, 1)
    assert (
        report["error"].strip().splitlines()[-1].startswith("ModuleNotFoundError: import of pipeline.engine.run halted")
    )


def test_only_a_rank_without_launcher_locks_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def main(given: object, stop: object, launcher: run.Launcher) -> int:
        with launcher.guard(tmp_path):
            seen.append((given, os.listdir(tmp_path)))
        return 0

    monkeypatch.setattr(run, "main", main)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    file = tmp_path / "recipe.resolved.yaml"
    assert run_rank("demo", ["seed=1"]) == run_rank(str(file), [], "ab") == 0
    assert seen == [(Unresolved("demo", ("seed=1",)), ["launch.lock"]), (RecipeFile(file, "ab"), [])]
