"""The demo starts what a user would type and names the log of what failed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.demo import run as demo
from pipeline.demo import stages
from pipeline.demo.stages import StageFailedError, StageRun, run_stage
from pipeline.errors import RecipeError


def record_commands(monkeypatch: pytest.MonkeyPatch, code: int) -> list[list[str]]:
    """Commands are noted instead of run, and end with ``code``."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_failing_command_names_stage_code_and_log(tmp_path: Path) -> None:
    with pytest.raises(StageFailedError) as error:
        stages._run("contrastive", [sys.executable, "-c", "raise SystemExit(5)"], tmp_path)
    assert str(error.value) == f"stage contrastive ended with exit code 5; its log is {tmp_path / 'logs'}"
    assert error.value.exit_code == 5, "the demo ends with the stage's own code"
    stages._run("contrastive", [sys.executable, "-c", ""], tmp_path)


def test_a_stage_is_launched_then_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = record_commands(monkeypatch, code=0)
    finished = run_stage("connector", tmp_path, 2, ["seed=3"])
    launch, export = (command[3:] for command in commands)
    assert launch[:5] == ["launch", "run", "demo_connector", "--num-procs", "2"] and launch[5:7] == [
        "--accelerator",
        "cpu",
    ]
    assert [launch[at + 1] for at, word in enumerate(launch) if word == "--set"] == [
        f"run_dir={tmp_path}", "train.world_sizes=[2]", "seed=3",
    ]  # fmt: skip
    assert export == ["export", str(tmp_path), "--out", str(tmp_path / "export")]
    assert finished.export_dir == tmp_path / "export" and finished.seconds >= 0


def test_a_failed_launch_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = record_commands(monkeypatch, code=4)
    with pytest.raises(StageFailedError, match="ended with exit code 4"):
        run_stage("connector", tmp_path, 2, [])
    assert len(commands) == 1


def test_only_rows_of_evaluations(tmp_path: Path) -> None:
    rows = [{"step": 0, "eval/bleu4": 1.0}, {"step": 1, "train/loss": 2.0}, {"step": 2, "eval/bleu4": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert StageRun("connector", tmp_path, tmp_path, 0.0).evaluations() == [rows[0], rows[2]]


def test_an_unknown_size_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="demo size 'huge' is not one of full, smoke") as error:
        demo.run_demo(tmp_path / "demo", seed=0, num_procs=1, size="huge")
    assert not (tmp_path / "demo").exists() and error.value.exit_code == 2
