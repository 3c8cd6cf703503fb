from __future__ import annotations

import hashlib
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import attempts, cli, options, ready
from launch.backends import Command
from launch.cli import app
from launch.hostfile import Host
from launch.lock import hold
from launch.plan import LaunchPlan, plan_ranks
from launch.report import report
from launch.verdict import Outcome
from pipeline.config.resolve import ResolvedRecipe
from pipeline.config.schema import Recipe
from pipeline.errors import EXIT_PREEMPTED, ClusterError, RecipeError
from tests.light_start import MODELS, output_of_light_start
from tests.source_tree import ROOT

runner = CliRunner()


def test_plan_prints_command_environment_and_ranks(tmp_path: Path) -> None:
    arguments = ["plan", "demo_connector", "--num-procs", "2", "--accelerator", "cpu", "--set", "train.steps=3"]
    arguments += ["--set", "train.global_batch=16", "--set", "train.micro_batch=4", "--run-dir", str(tmp_path / "run")]
    text = runner.invoke(app, arguments).stdout
    assert "deepspeed.launcher.launch" in text and "run/recipe.resolved.yaml --sha256 " in text
    assert "export DS_ACCELERATOR=cpu" in text and "2 ranks x 2 accumulation_steps" in text
    data = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert [rank["rank"] for rank in data["ranks"]] == [0, 1] and data["accumulation_steps"] == 2
    other = json.loads(runner.invoke(app, [*arguments, "--json", "--set", "train.steps=4"]).stdout)
    assert other["argv"][-1] != data["argv"][-1], "the settings are in the file that the sha256 names"
    assert data["argv"][-3] == str(tmp_path / "run" / "recipe.resolved.yaml")
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_plan_names_the_groups_of_ranks_that_share_sequences(tmp_path: Path) -> None:
    arguments = ["plan", "demo_continued_pretraining", "--num-procs", "4", "--accelerator", "cpu"]
    sets = ["--set", "train.sequence_parallel=2", "--set", "train.world_sizes=[4]"]
    arguments += [*sets, "--run-dir", str(tmp_path / "run")]
    text = runner.invoke(app, arguments).stdout
    assert "global_batch 16 = micro_batch 8 x 2 groups of 2 ranks x 1 accumulation_steps" in text


def test_plan_shows_what_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("hosts").write_text("a slots=1\nb slots=1\n")
    value, run_dir = '{"a": "b"} $HOME `id` :car: [b] \x07', "run '50% %h'"
    arguments = ["plan", "demo_connector", "--hostfile", "hosts", "--export", f"A={value}", "--run-dir", run_dir]
    text = runner.invoke(app, arguments).stdout
    assert f"export A={shlex.quote(value)}\n" in text and f"cd {shlex.quote(str(folder))}\n" in text
    recipe = str(folder / run_dir / "recipe.resolved.yaml")
    assert f" {shlex.quote(recipe)} --sha256 " in text and "\n# carried to every host" in text
    data = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert data["env"]["A"] == value and data["argv"][-3] == recipe and data["folder"] == str(folder)
    assert data["started_by"]["argv"][0] == "pdsh"


def test_run_checks_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "supervise", lambda *_: pytest.fail("started"))
    result = runner.invoke(app, ["run", "demo_connector", "--num-procs", "3"])
    assert isinstance(result.exception, RecipeError) and "not a multiple" in str(result.exception)


def test_run_looks_at_inputs_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "supervise", lambda *_: pytest.fail("started"))
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["run", "demo_connector", "--num-procs", "1"])
    assert isinstance(result.exception, RecipeError)
    assert "data.train.0.shards=runs/demo/shards/video does not exist" in str(result.exception)


@pytest.fixture
def inputs_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "check_recipe", lambda loaded, sizes: None)


@pytest.mark.usefixtures("inputs_are_there")
def test_run_asks_the_hosts_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: Command, plan: LaunchPlan, recipe: Recipe) -> None:
        raise ClusterError(f"{[host.name for host in plan.hosts]}")

    monkeypatch.setattr(ready, "check_hosts", refuse)
    monkeypatch.setattr(attempts, "supervise", lambda *_: pytest.fail("started"))
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    result = runner.invoke(app, ["run", "demo_connector", "--hostfile", str(tmp_path / "hosts")])
    assert isinstance(result.exception, ClusterError) and str(result.exception) == "['a', 'b']"


@pytest.mark.usefixtures("inputs_are_there")
def test_run_returns_the_worst_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Command] = []

    def fake(command: Command, run_dir: Path, ranks: tuple[str, int], *_: object) -> Outcome:
        started.append(command)
        assert run_dir == tmp_path and ranks[1] == 2
        content = (run_dir / "recipe.resolved.yaml").read_bytes()
        assert ResolvedRecipe.from_yaml(content.decode()).recipe.train.steps == 7
        assert command.argv[-2:] == ("--sha256", hashlib.sha256(content).hexdigest())
        return Outcome(4, 1, {0: 1, 1: 4}, {1: "shard 3 is damaged"})

    monkeypatch.setattr(attempts, "supervise", fake)
    arguments = ["run", "demo_connector", "--num-procs", "2", "--run-dir", str(tmp_path), "--set", "train.steps=7"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 4 and started[0].argv[-3] == str(tmp_path / "recipe.resolved.yaml")
    assert "launch failed: the data (exit code 4)" in result.stderr
    assert "rank 1 on localhost: exit code 4: shard 3 is damaged" in result.stderr


def test_report_groups_equal_errors() -> None:
    hosts = (Host("a", (0, 1)), Host("b", (0, 1)))
    plan = LaunchPlan(Path("s"), (), Path("r"), hosts, plan_ranks(hosts, "a", 1), "id")
    outcome = Outcome(137, 247, {0: 1, 1: 1, 3: 0}, {0: "Traceback\n  x\nOSError: gone\n", 1: "OSError: gone"})
    assert report(outcome, plan) == [
        "launch killed by signal 9 (exit code 137)",
        "  rank 0,1 on a: exit code 1: OSError: gone",
        "  rank 2 on b: no report; it was killed or never started",
    ]
    lost = report(Outcome(3, -9, {0: 1, 1: 1}, lost_hosts=("b",)), plan)
    assert lost[0] == "launch failed: a host or the launcher (exit code 3)"
    assert (
        lost[1]
        == "  b: connection lost, or the launcher there was killed; ranks may still run there if it cannot be reached"
    )
    assert report(Outcome(75, 75), plan) == [
        "launch stopped and saved; start the same command again to resume (exit code 75)"
    ]


def test_report_says_what_became_of_the_work() -> None:
    plan = LaunchPlan(Path("s"), (), Path("r"), (), (), "id")
    assert report(Outcome(75, 75, stopped="saved at step 12"), plan) == [
        "launch stopped, saved at step 12; start the same command again to resume (exit code 75)"
    ]
    assert report(Outcome(130, 130, stopped="before the first step, nothing to save"), plan) == [
        "launch interrupted before the first step, nothing to save; start the same command again to resume"
        " (exit code 130)"
    ]
    assert report(Outcome(6, 6), plan) == ["launch failed: damaged checkpoints (exit code 6)"]


@pytest.mark.usefixtures("inputs_are_there")
@pytest.mark.parametrize(
    ("number", "code", "verb"), [(signal.SIGTERM, 75, "stopped"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_before_anything_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int, verb: str
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(ready, "check_hosts", lambda *_: signal.raise_signal(number))
    monkeypatch.setattr(attempts, "supervise", lambda *_: pytest.fail("started"))
    result = runner.invoke(app, ["run", "demo_connector", "--num-procs", "2", "--run-dir", str(tmp_path)])
    expected = f"launch {verb} by {number.name} before the first step, nothing to save (exit code {code})"
    assert result.exit_code == code and expected in result.stderr
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(number) == before


@pytest.mark.usefixtures("inputs_are_there")
def test_a_signal_after_the_end_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "supervise", lambda *_: Outcome(0, 0))

    def late(*_: object) -> list[str]:
        signal.raise_signal(signal.SIGTERM)
        return ["the end"]

    monkeypatch.setattr(attempts, "report", late)
    result = runner.invoke(app, ["run", "demo_connector", "--num-procs", "2", "--run-dir", str(tmp_path)])
    assert result.exit_code == 0 and "the end" in result.stderr


@pytest.mark.usefixtures("inputs_are_there")
def test_a_second_launch_on_a_run_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "supervise", lambda *_: pytest.fail("started"))
    with hold(tmp_path, "first"):
        result = runner.invoke(app, ["run", "demo_connector", "--num-procs", "2", "--run-dir", str(tmp_path)])
    assert isinstance(result.exception, RecipeError) and "launch first" in str(result.exception)


def test_plan_starts_without_torch() -> None:
    shown = output_of_light_start("launch.cli", ["plan", "demo_connector"], (*MODELS, "numpy", "pyarrow"))
    assert "# demo_connector: stage connector" in shown


def test_user_errors_have_no_traceback() -> None:
    argv = [sys.executable, "-m", "launch.cli", "run", "demo_connector", "--num-procs", "3"]
    argv += ["--set", "train.global_batch=16", "--set", "train.micro_batch=4"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "= 12; 12 or 24 would be" in done.stderr


def test_a_signal_while_the_launch_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "prepare", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    result = runner.invoke(app, ["run", "demo_connector", "--num-procs", "2", "--run-dir", str(tmp_path)])
    assert result.exit_code == EXIT_PREEMPTED
    assert "launch stopped by SIGTERM before the first step, nothing to save (exit code 75)" in result.stderr
