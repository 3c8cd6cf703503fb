"""What a rank makes of its command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from launch import lock
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
