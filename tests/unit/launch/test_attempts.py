"""A launch with its attempts: planned again for the hosts that remain, while nothing real is started."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import attempts, cli, options, ready
from launch.attempts import newest_checkpoint
from launch.backends import Command
from launch.cli import app
from launch.options import LaunchOptions
from launch.plan import LaunchPlan
from launch.preflight import UnfitHostsError
from launch.prepare import TooFewHostsError, prepare, prepare_again
from launch.slurm import Allocation
from launch.stop import request_stop
from launch.supervise import Watch
from launch.verdict import Cause, Outcome
from pipeline.errors import ClusterError, RecipeError

runner = CliRunner()
DEAD = Outcome(3, 255, cause=Cause((), "the connection to b was lost"), lost_hosts=("b",), step=5)
DONE = Outcome(0, 0, {0: 0}, step=9)


@dataclasses.dataclass
class World:
    """What the attempts of a launch met."""

    folder: Path
    outcomes: list[Outcome]
    planned: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    """Hosts of every attempt that was started."""
    env: list[str] = dataclasses.field(default_factory=list)
    unfit: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    """Hosts that refuse, per look at them."""
    killed: int = 0
    meanwhile: Callable[[], None] = lambda: None

    def supervise(
        self, command: Command, run_dir: Path, ranks: tuple[str, int], patience: object, watch: Watch
    ) -> Outcome:
        self.planned.append(tuple(dict.fromkeys(watch.hosts.values())))
        env = command.arrives.env if command.arrives is not None else command.env
        self.env.append(env[attempts.ATTEMPT])
        outcome = self.outcomes.pop(0)
        if outcome.step:
            folder = run_dir / "checkpoints" / f"step-{outcome.step:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "COMPLETE").touch()
        self.meanwhile()
        return outcome

    def check(self, command: Command, plan: LaunchPlan, recipe: object) -> None:
        refusing = self.unfit.pop(0) if self.unfit else ()
        bad = [host.name for host in plan.hosts if host.name in refusing]
        if bad:
            raise UnfitHostsError("no answer", bad)

    def launch(
        self,
        *arguments: str,
        hosts: str = "a slots=1\nb slots=1\nc slots=1\n",
        recipe: str = "demo_continued_pretraining",
    ) -> Any:
        (self.folder / "hosts").write_text(hosts)
        argv = ["run", recipe, "--restart-delay", "0"]
        argv += ["--hostfile", str(self.folder / "hosts")] if hosts else []
        argv += [
            "--run-dir",
            str(self.folder / "run"),
            "--set",
            "train.global_batch=24",
            "--set",
            "train.micro_batch=2",
        ]
        return runner.invoke(app, [*argv, *arguments])

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "run" / "logs" / "status.json").read_text())
        return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path, [])
    monkeypatch.setattr(options, "check_recipe", lambda *_: None)
    monkeypatch.setattr(options, "load_with_inputs", options.load)
    monkeypatch.setattr(attempts, "supervise", made.supervise)
    monkeypatch.setattr(attempts, "check_hosts", made.check)
    monkeypatch.setattr(attempts, "check_health", lambda *_: None)
    monkeypatch.setattr(attempts, "check_memory", lambda *_: None)
    monkeypatch.setattr(ready, "check_hosts", made.check)
    monkeypatch.setattr(attempts, "_POLL_SECONDS", 0.01)

    def kill(*_: object) -> None:
        assert (tmp_path / "run" / "launch.lock").exists(), "locked between two attempts"
        made.killed += 1

    monkeypatch.setattr(attempts, "signal_hosts", kill)
    return made


def test_a_lost_host_is_left_out_once_and_asked_again_later(world: World) -> None:
    died = dataclasses.replace(
        DEAD, code=137, lost_hosts=(), step=7, cause=Cause((0,), "killed, or ended without a word", 7)
    )
    world.outcomes = [DEAD, died, DONE]
    result = world.launch()
    assert result.exit_code == 0, result.exception
    assert world.planned == [("a", "b", "c"), ("a", "c"), ("a", "b", "c")]
    assert world.env == ["1", "2", "3"] and world.killed == 2
    lines = result.stderr.splitlines()
    first = "attempt 1 on a, b, c ended at step 5 with exit code 3, saved at step 5: the connection to b was lost"
    assert f"{first}; attempt 2 in 0 s" in lines
    assert lines[-4:] == [
        "launch finished (exit code 0)", f"  {first}",
        "  attempt 2 on a, c ended at step 7 with exit code 137, saved at step 7: rank 0 on a: killed, or ended without"
        " a word",
        "  attempt 3 on a, b, c ended at step 9 with exit code 0, saved at step 9: finished",
    ]  # fmt: skip
    log = (world.folder / "run" / "logs" / "launch.log").read_text()
    assert "attempt 2 of launch" in log and "2 ranks on a x 1, c x 1" in log
    status = world.status
    assert (status["state"], status["code"], status["attempt"]) == ("ended", 0, 3)
    assert [restart["step"] for restart in status["restarts"]] == [5, 7]
    assert not (world.folder / "run" / "launch.lock").exists()


def test_hosts_that_do_not_answer_are_left_out_and_the_batch_decides_how_many_go_on(world: World) -> None:
    """Of six hosts one is lost. Five cannot share 24 samples, so four are asked; one of them is silent."""
    world.outcomes = [DEAD, DONE]
    world.unfit = [(), ("c",)]
    result = world.launch(hosts="".join(f"{name} slots=1\n" for name in "abcdef"))
    assert result.exit_code == 0, result.exception
    assert world.planned == [tuple("abcdef"), tuple("adef")]
    assert "without c: no answer" in result.stderr


def test_too_few_hosts_are_waited_for_and_then_given_up(world: World) -> None:
    world.outcomes = [DEAD]
    world.unfit = [(), *[("b", "c")] * 9]
    result = world.launch("--min-hosts", "2", "--max-restarts", "2")
    assert result.exit_code == 3
    few = "1 hosts are left (a), fewer than --min-hosts 2"
    assert result.stderr.splitlines()[-5:] == [
        f"launch failed: {few} (exit code 3)",
        "  attempt 1 on a, b, c ended at step 5 with exit code 3, saved at step 5: the connection to b was lost",
        f"  attempt 2 nowhere ended with exit code 3, saved at step 5: {few}",
        f"  attempt 3 nowhere ended with exit code 3, saved at step 5: {few}",
        "  not restarted again: 2 restarts in a row (--max-restarts) brought no newer checkpoint",
    ]
    assert world.planned == [("a", "b", "c")]


def test_one_attempt_as_before(world: World) -> None:
    world.outcomes = [DEAD]
    result = world.launch("--max-restarts", "0")
    assert result.exit_code == 3 and "attempt 1" not in result.stderr


def test_a_bug_is_not_tried_again(world: World) -> None:
    world.outcomes = [Outcome(1, 1, {0: 1}, {0: "ValueError: x"})]
    assert world.launch().exit_code == 1 and len(world.planned) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_between_two_attempts(world: World, number: signal.Signals, code: int) -> None:
    world.outcomes = [DEAD]

    def interrupt(command: Command, launch_id: str, *_: object) -> None:
        signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempts, "signal_hosts", interrupt)
        result = world.launch()
    verb = "interrupted" if number == signal.SIGINT else "stopped"
    assert result.exit_code == code
    assert f"launch {verb} by {number.name} between two attempts, saved at step 5 (exit code {code})" in result.stderr
    assert world.status["state"] == "ended" and world.status["code"] == code


def test_a_signal_right_after_an_attempt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.outcomes = [DEAD]

    def interrupted(*_: object) -> str:
        signal.raise_signal(signal.SIGTERM)
        return "the connection to b was lost"

    monkeypatch.setattr(attempts, "summary", interrupted)
    result = world.launch()
    assert result.exit_code == 75 and len(world.planned) == 1
    assert "launch stopped by SIGTERM between two attempts, saved at step 5 (exit code 75)" in result.stderr


@pytest.mark.parametrize("chosen", [("--include", "a@b@c"), ("--exclude", "d")])
def test_a_filter_may_name_a_node_that_is_lost(
    world: World, monkeypatch: pytest.MonkeyPatch, chosen: tuple[str, str]
) -> None:
    nodes = [*"abcd"]
    monkeypatch.setattr(options, "read_allocation", lambda environ: Allocation("7", tuple(nodes), 1, 0, 0))
    world.outcomes = [DEAD, DONE]

    def lose() -> None:
        nodes[:] = ["a", "c"]

    world.meanwhile = lose
    result = world.launch("--backend", "slurm", "--accelerator", "cpu", *chosen, hosts="")
    assert result.exit_code == 0, result.exception
    assert world.planned == [("a", "b", "c"), ("a", "c")]


@pytest.mark.parametrize(("number", "queued"), [(signal.SIGUSR1, ["again"]), (signal.SIGINT, [])])
def test_a_job_that_is_stopped_between_two_attempts_queues_again(
    world: World, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, queued: list[str]
) -> None:
    """Near its time limit, say, while it waits for hosts."""
    job = Allocation("7", ("a", "b", "c"), 1, 0, 0, is_batch=True)
    monkeypatch.setattr(options, "read_allocation", lambda environ: job)
    monkeypatch.setattr(cli, "read_allocation", lambda environ: job)
    asked: list[str] = []
    monkeypatch.setattr(cli, "requeue", lambda *_: asked.append("again"))
    world.outcomes = [DEAD]
    monkeypatch.setattr(attempts, "signal_hosts", lambda *_: signal.raise_signal(number))
    result = world.launch("--backend", "slurm", "--accelerator", "cpu", hosts="")
    assert result.exit_code in (75, 130) and asked == queued, result.exception
    assert world.status["state"] == "ended"


def test_a_request_to_stop_ends_the_wait(world: World) -> None:
    world.outcomes = [dataclasses.replace(DEAD, step=None)]
    world.meanwhile = lambda: request_stop(world.folder / "run", now=False)
    result = world.launch("--restart-delay", "30")
    assert result.exit_code == 75
    assert "launch stopped by SIGTERM between two attempts, nothing saved yet (exit code 75)" in result.stderr


def test_an_error_of_a_restart_is_the_end(world: World) -> None:
    world.outcomes = [DEAD]
    world.meanwhile = lambda: (world.folder / "hosts").unlink()
    result = world.launch()
    assert isinstance(result.exception, RecipeError) and "hosts cannot be read" in world.status["message"]


def test_a_restart_runs_the_recipe_of_the_first_start(world: World) -> None:
    """Somebody edits the file for the next run, while this one goes on."""
    recipe = world.folder / "mine.yaml"
    recipe.write_text("extends: demo_continued_pretraining\ntrain:\n  steps: 7\n")
    world.outcomes = [DEAD, DONE]
    world.meanwhile = lambda: recipe.write_text("nonsense: true\n")
    result = world.launch(recipe=str(recipe))
    assert result.exit_code == 0, result.exception
    assert "steps: 7" in (world.folder / "run" / "recipe.resolved.yaml").read_text() and len(world.planned) == 2


def test_a_job_that_has_lost_a_node_goes_on_with_as_many_as_the_batch_allows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM no longer lists the node. Five cannot share 24 samples, so four go on."""
    nodes = [*"abcdef"]
    monkeypatch.setattr(options, "read_allocation", lambda environ: Allocation("7", tuple(nodes), 1, 0, 0))
    world.outcomes = [DEAD, DONE]
    world.meanwhile = lambda: nodes.remove("b") if "b" in nodes else None
    result = world.launch("--backend", "slurm", "--accelerator", "cpu", hosts="")
    assert result.exit_code == 0, result.exception
    assert world.planned == [tuple("abcdef"), tuple("acde")]


def test_one_machine_is_planned_again(world: World) -> None:
    world.outcomes = [dataclasses.replace(DEAD, lost_hosts=()), DONE]
    assert world.launch("--num-procs", "2", "--accelerator", "cpu", hosts="").exit_code == 0
    assert world.planned == [("localhost",), ("localhost",)]


def test_a_port_that_is_still_in_use_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    def busy_once(*_: object) -> None:
        looks.append("port")
        if len(looks) == 1:
            raise RecipeError("port 29500 is in use")

    monkeypatch.setattr(attempts, "check_hosts", busy_once)
    world.outcomes = [DEAD, DONE]
    result = world.launch()
    assert result.exit_code == 0, result.exception
    assert "attempt 2 nowhere ended with exit code 3, saved at step 5: port 29500 is in use" in result.stderr


def test_no_number_of_hosts_fits(world: World) -> None:
    hosts = world.folder / "hosts"
    hosts.write_text("a slots=1\nb slots=5\nc slots=1\n")  # 7 ranks; without a or c, 6 or 5
    given = LaunchOptions(
        recipe="demo_continued_pretraining", hostfile=hosts,
        sets=["train.world_sizes=[7]", "train.global_batch=14", "train.micro_batch=2", f"run_dir={world.folder}"],
    )  # fmt: skip
    first = prepare(given)
    assert prepare_again(given, first, {"b"}, 1).plan.world_size == 1
    with pytest.raises(
        TooFewHostsError, match=r"no 2 to 2 of the hosts that are left \(a, b\) can go on: .*global_batch"
    ):
        prepare_again(given, first, {"c"}, 2)
    with pytest.raises(TooFewHostsError, match=r"0 hosts are left \(none\), fewer than --min-hosts 1"):
        prepare_again(given, first, {"a", "b", "c"}, 1)
    assert issubclass(TooFewHostsError, ClusterError)


def test_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("step-000900", "step-1000000", "step-000004.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMPLETE").touch()
    (tmp_path / "checkpoints" / "step-2000000").mkdir()
    assert newest_checkpoint(tmp_path) == 1_000_000
