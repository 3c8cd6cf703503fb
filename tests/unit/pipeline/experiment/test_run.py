"""What an experiment runs, shares, leaves out and reports."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.lock import hold
from launch.slt import app
from pipeline.config.source import dump_yaml
from pipeline.errors import RecipeError
from pipeline.experiment import run as run_module
from pipeline.experiment.matrix import Matrix
from pipeline.experiment.run import ExperimentStoppedError, run_trials
from pipeline.experiment.steps import plan
from pipeline.experiment.table import table, write_reports
from tests.unit.pipeline.experiment.conftest import Commands

Read = Callable[[dict[str, Any]], Matrix]


def reports(matrix: Matrix, commands: Commands) -> dict[str, str]:
    """Run what is missing; the texts of the reports."""
    trials = plan(matrix)
    failures = run_trials(matrix, trials, commands)
    return {path.name: path.read_text() for path in write_reports(matrix, table(matrix, trials), failures)}


def test_arms_share_steps_and_seeds_do_not(content: dict[str, Any], read: Read, commands: Commands) -> None:
    matrix = read(content)
    trials = plan(matrix)
    folders = [[step.folder.name for step in trial.steps] for trial in trials]
    assert len(trials) == 4
    assert folders[0][0] == folders[1][0] != folders[2][0] == folders[3][0]
    assert len({names[1] for names in folders}) == 4
    reports(matrix, commands)
    runs = [line for line in commands.lines if line.startswith("launch run")]
    assert len(runs) == 6, "two encoders, four translators"
    assert all("--num-procs 2 --accelerator cpu" in line and "--set seed=" in line for line in runs)
    encoder = trials[0].steps[0].export
    assert f"--set model.visual.path={encoder} " in f"{runs[1]} "


def test_a_changed_setting_is_another_step(content: dict[str, Any], read: Read) -> None:
    before = plan(read(content))[0].steps
    content["steps"][0]["set"] = {"train.optimizer.warmup_steps": 3}
    after = plan(read(content))[0].steps
    assert before[0].folder != after[0].folder
    assert before[1].folder != after[1].folder, "it reads from a step that is another one"
    content["steps"][0]["set"] = {}
    assert [step.folder for step in plan(read(content))[0].steps] == [step.folder for step in before]


def test_stopped_twice_it_ends_with_the_table_of_one_left_alone(content: dict[str, Any], read: Read) -> None:
    def right(line: str) -> int:
        return 15

    matrix, calm = read(content), Commands(quality=right)
    undisturbed = reports(matrix, calm)
    other = read({**content, "out": content["out"] + "-2"})
    for stop, code, exit_code in (("translator-", 75, 75), ("evaluate", -15, 75), ("evaluate", 130, 130)):
        with pytest.raises(ExperimentStoppedError, match=r"stopped \(exit code .*\); run the") as error:
            run_trials(other, plan(other), Commands({stop: code}, quality=right))
        assert error.value.exit_code == exit_code
    last = Commands(quality=right)
    again = reports(other, last)
    whole = [line.split()[0] for line in calm.lines]
    assert [line.split()[0] for line in last.lines] == whole[4:], "what was done is not done again"
    first, second = (json.loads(found["report.json"]) for found in (undisturbed, again))
    assert all(first[key] == second[key] for key in ("name", "failures", "arms"))
    assert undisturbed["report.md"] == again["report.md"]


def test_a_changed_score_is_not_read_from_old_predictions(
    content: dict[str, Any], read: Read, commands: Commands
) -> None:
    reports(read(content), commands)
    content["scores"][0] |= {"split": "dev", "pose": ["data/pose"]}
    again = Commands()
    reports(read(content), again)
    assert len(again.lines) == 4 and all("--split dev" in line and "--pose data/pose" in line for line in again.lines)


def test_the_table_compares_with_the_baseline(content: dict[str, Any], read: Read) -> None:
    matrix = read(content)
    long = {trial.steps[1].folder.name for trial in plan(matrix) if "long" in trial.arm.name}
    commands = Commands(quality=lambda line: 18 if any(name in line for name in long) else 8)
    found = reports(matrix, commands)
    base, other = json.loads(found["report.json"])["arms"]
    assert base["arm"] == {"warmup": "short"} and base["scores"]["test"]["difference"] is None
    test = other["scores"]["test"]
    assert len(test["values"]) == 2 and test["deviation"] == 0
    difference = test["difference"]
    assert difference["low"] > 0 and difference["p"] < 0.05
    assert difference["score"] == pytest.approx(test["mean"] - base["scores"]["test"]["mean"])
    assert base["scores"]["loss"]["values"] == [0.5, 0.5]
    assert other["unequal_compute"] and not base["unequal_compute"]
    assert "UNEQUAL: 1.17 of the baseline" in found["report.md"]
    assert "Only 2 seeds" in found["report.md"] and "<td>warmup=long</td>" in found["report.html"]


@pytest.mark.parametrize(("measure", "cost"), [("seconds", 12.0), ("samples", 80.0), ("steps", 20.0)])
def test_compute_is_that_of_all_steps_of_an_arm(
    content: dict[str, Any], read: Read, commands: Commands, measure: str, cost: float
) -> None:
    content["compute"]["measure"] = measure
    matrix = read(content)
    run_trials(matrix, plan(matrix), commands)
    assert table(matrix, plan(matrix))[0].compute == [cost, cost]


def test_an_arm_that_fails_is_named_and_others_go_on(content: dict[str, Any], read: Read) -> None:
    matrix = read(content)
    commands = Commands({"warmup_steps=7": 5})
    failures = run_trials(matrix, plan(matrix), commands)
    assert len(failures) == 2 and "warmup=long, seed 0: step translator: training ended with exit code 5" in failures[0]
    rows = table(matrix, plan(matrix))
    assert rows[0].cells["test"].values and "test" not in rows[1].cells
    assert "FAILED: warmup=long, seed 1" in reports(matrix, Commands({"warmup_steps=7": 5}))["report.md"]
    broken = Commands({"launch run demo_contrastive": 3})
    content["out"] += "-3"
    matrix = read(content)
    assert len(run_trials(matrix, plan(matrix), broken)) == 4
    assert len(broken.lines) == 2, "a shared step is tried once per seed"
    content["out"] += "-4"
    matrix = read(content)
    assert "its export ended with exit code 6" in run_trials(matrix, plan(matrix), Commands({"export ": 6}))[0]


def test_recipes_that_cannot_be_are_told_before_anything_runs(content: dict[str, Any], read: Read) -> None:
    content["axes"]["warmup"]["long"] = {"translator": {"train.optimizer.warmup_step": 7}}
    with pytest.raises(RecipeError, match=r"arms that cannot be trained:\n  warmup=long: (.|\n)*did you mean"):
        plan(read(content))
    content["axes"]["warmup"]["long"] = {"translator": None, "encoder": None}
    with pytest.raises(RecipeError, match="warmup=long: it leaves out every step"):
        plan(read(content))
    content["axes"]["warmup"]["long"] = {"encoder": None, "translator": {"model.visual.path": "x"}}
    with pytest.raises(RecipeError, match="the arm warmup=long leaves out step encoder, which a score asks for"):
        plan(read(content))


def test_the_command(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(dump_yaml(content))
    shown = CliRunner().invoke(app, ["experiment", str(path), "--dry-run"])
    assert shown.exit_code == 0 and "4 trials, 6 trainings to run below" in shown.output
    assert "demo_contrastive seed=0" in shown.output and not Path(content["out"]).exists()
    commands = Commands()
    monkeypatch.setattr(run_module.run_trials, "__defaults__", (commands,))
    done = CliRunner().invoke(app, ["experiment", str(path)])
    assert done.exit_code == 0, done.output
    assert "warmup=long" in done.output and "report.html" in done.output
    failed = Commands({"warmup_steps=7": 5})
    monkeypatch.setattr(run_module.run_trials, "__defaults__", (failed,))
    path.write_text(dump_yaml({**content, "out": str(tmp_path / "other")}))
    assert CliRunner().invoke(app, ["experiment", str(path)]).exit_code == 1


def test_commands_run_in_processes_of_their_own_which_hear_of_signals(tmp_path: Path) -> None:
    assert run_module.call_slt(["recipe", "show", str(tmp_path / "none.yaml")]) == 2
    before = signal.getsignal(signal.SIGTERM)

    def ask() -> None:
        while signal.getsignal(signal.SIGTERM) == before:  # until then it would end this process
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "status.json").write_text(json.dumps({"launch_id": "a", "state": "running", "written": 0}))
    with hold(tmp_path, "a"):  # `--watch` goes on as long as a launch runs there
        threading.Thread(target=ask).start()
        code = run_module.call_slt(["launch", "status", str(tmp_path), "--watch"])
    assert code == -signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
