from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

from launch import processes
from launch import supervise as supervision
from launch.backends import Command
from launch.output import Output
from launch.plan import LAUNCH_ID
from launch.processes import Patience, end_orphans
from launch.ranks import find_processes
from launch.supervise import supervise
from launch.verdict import Evidence, Outcome, Report, read_reports, verdict, worst_code
from pipeline.errors import ClusterError, StorageError
from tests.unit.launch import stubs

QUICK = Patience(grace_seconds=10, failure_seconds=0.3, leftover_seconds=0.3)


def run(
    folder: Path, mode: str, patience: Patience = QUICK, signals: tuple[int, ...] = (), world: int = 2
) -> tuple[Outcome, str]:
    """Supervise a stub launch, sending ourselves signals once all ranks are ready; returns how it ended and its id."""
    launch_id = uuid.uuid4().hex
    argv = (sys.executable, stubs.__file__, "launcher", str(folder), str(world), mode)
    command = Command(argv=argv, env={LAUNCH_ID: launch_id})

    def send() -> None:
        while len(list(folder.glob("ready-*"))) < world:
            time.sleep(0.02)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    thread = threading.Thread(target=send, daemon=True)
    if signals:
        thread.start()
    outcome = supervise(command, folder, (launch_id, world), patience)
    if signals:
        thread.join()
    assert not list(find_processes(launch_id)), "processes were left behind"
    return outcome, launch_id


def test_a_good_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome, _ = run(tmp_path, "ok")
    assert (outcome.code, outcome.rank_codes, outcome.signals) == (0, {0: 0, 1: 0}, ())
    log = (tmp_path / "logs" / "launch.log").read_text()
    assert "hello from rank 0" in log and "hello from rank 1" in log
    assert "hello from rank 0" in capfd.readouterr().err


def test_the_telling_rank_decides(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, "fail")
    assert outcome.code == 4 and outcome.rank_codes == {0: 1, 1: 4}
    assert outcome.errors == {0: "connection lost", 1: "shard 3 is damaged"}


def test_a_killed_rank_is_seen(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, "die")
    assert outcome.code == 137 and outcome.launcher_code == 256 - 9 and outcome.rank_codes == {}


def test_sigterm_lets_ranks_save(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, "save", signals=(signal.SIGTERM,))
    assert outcome.code == 75 and outcome.rank_codes == {0: 75, 1: 75} and outcome.signals == (signal.SIGTERM,)


def test_workers_of_ranks_are_not_signalled(tmp_path: Path) -> None:
    assert run(tmp_path, "workers", signals=(signal.SIGTERM,))[0].code == 75


def test_grace_ends(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, "stubborn", Patience(grace_seconds=0.4, leftover_seconds=0.2), (signal.SIGTERM,))
    assert outcome.code == 137 and outcome.rank_codes == {}


def test_second_interrupt_kills(tmp_path: Path) -> None:
    start = time.monotonic()
    outcome, _ = run(tmp_path, "stubborn", signals=(signal.SIGTERM, signal.SIGINT, signal.SIGINT))
    assert outcome.code == 137 and time.monotonic() - start < 8


def test_others_are_stopped_when_a_rank_fails_and_the_rest_hangs(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, "fail_and_hang")
    assert outcome.code == 5, "the rank that failed is the cause, not the one that had to be killed"
    assert outcome.errors == {0: "loss is nan"}


def test_orphans_of_a_dead_launcher_are_killed(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, "stubborn_orphans")
    assert outcome.code != 0


def test_stale_reports_and_rank_variables_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "exit-rank-7.json").write_text('{"rank": 7, "code": 5}')
    monkeypatch.setenv("WORLD_SIZE", "64")
    script = "import os, sys; sys.exit(9 if 'WORLD_SIZE' in os.environ else 0)"
    outcome = supervise(Command(argv=(sys.executable, "-c", script)), tmp_path, ("x", 0))
    assert outcome == Outcome(0, 0)


def test_a_command_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="cannot start /no/such/program: No such file"):
        supervise(Command(argv=("/no/such/program",)), tmp_path, ("x", 1))
    assert signal.getsignal(signal.SIGTERM) is not None


def test_remote_ranks_are_signalled_through_the_backend(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The remote call is a shell here; the ranks are local but reached only through it."""
    launch_id = uuid.uuid4().hex
    argv = (sys.executable, stubs.__file__, "launcher", str(tmp_path), "2", "save")
    command = Command(
        argv=argv,
        env={LAUNCH_ID: launch_id, "PYTHONSAFEPATH": ""},
        remote=("env", "-u", LAUNCH_ID, "sh", "-c", "{command}"),
    )

    def send() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    outcome = supervise(command, tmp_path, (launch_id, 2), QUICK)
    assert outcome.code == 75 and "could not be sent" not in caplog.text


def test_an_unreachable_host_does_not_stop_the_stopping(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for remote in (("false", "{command}"), ("/no/such/pdsh", "{command}")):
        command = Command(argv=(sys.executable, "-c", "raise SystemExit(1)"), remote=remote)
        assert supervise(command, tmp_path, ("x", 1), QUICK).code == 3
    assert caplog.text.count("SIGKILL could not be sent to all hosts") == 2


def test_a_lost_host_ends_the_launch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The ranks of the other hosts would wait for it; DeepSpeed's runner would wait for them."""
    says = "pdsh@a: b: ssh exited with exit code 255"
    script = f"import time; print('a: {says}'); print('{says}', flush=True); time.sleep(60)"
    command = Command(argv=(sys.executable, "-c", script), lost_host="^pdsh@[^ ]+: ([^ ]+): .* 255$")
    start = time.monotonic()
    outcome = supervise(command, tmp_path, ("x", 2), QUICK)
    assert outcome.code == 3 and outcome.lost_hosts == ("b",) and time.monotonic() - start < 20
    assert "the connection to b is lost" in caplog.text


def test_a_connection_that_we_end_ourselves_is_not_lost(tmp_path: Path) -> None:
    """When ranks are killed after a failure their ssh ends as if the host were gone."""
    logs = tmp_path / "logs"
    logs.mkdir()
    script = (
        f"import pathlib, time\nlogs = pathlib.Path({str(logs)!r})\n"
        """(logs / 'exit-rank-0.json').write_text('{"rank": 0, "code": 4}')\n"""
        "while not (logs / 'stop').exists(): time.sleep(0.02)\n"
        "print('pdsh@a: b: ssh exited with exit code 255', flush=True); time.sleep(60)"
    )
    command = Command(
        argv=(sys.executable, "-c", script),
        remote=("sh", "-c", f": '{{command}}'; touch {logs}/stop; sleep 0.5"),
        lost_host="^pdsh@[^ ]+: ([^ ]+): .* 255$",
    )
    outcome = supervise(command, tmp_path, ("x", 2), QUICK)
    assert outcome.code == 4 and outcome.lost_hosts == ()


def test_a_closed_stderr_keeps_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, chunk: bytes) -> None:
            raise BrokenPipeError

    class Stderr:
        buffer = Closed()

    monkeypatch.setattr("launch.output.sys.stderr", Stderr())
    logging.getLogger("launch.output").setLevel(logging.CRITICAL)
    script = "import time\nfor n in range(3): print(n, flush=True); time.sleep(.05)"
    supervise(Command(argv=(sys.executable, "-c", script)), tmp_path, ("x", 0))
    logging.getLogger("launch.output").setLevel(logging.NOTSET)
    assert (tmp_path / "logs" / "launch.log").read_text() == "0\n1\n2\n"


@pytest.mark.parametrize(
    ("ranks", "launcher", "world", "code"),
    [
        ({0: 0, 1: 0}, 0, 2, 0),
        ({0: 75, 1: 75}, 75, 2, 75),
        ({0: 75, 1: 0}, 75, 2, 75),
        ({0: 75, 1: 75}, -9, 2, 75),
        ({0: 0, 1: 0}, 1, 2, 1),
        ({0: 0, 1: 0}, 245, 2, 139),
        ({0: 0}, 0, 2, 137),
        ({0: 75}, 75, 2, 137),
        ({}, 1, 2, 3),
        ({}, 127, 2, 3),
        ({}, 0, 2, 137),
        ({}, -15, 2, 143),
        ({}, 241, 2, 143),
        ({}, 137, 2, 137),
        ({0: 1}, 247, 2, 137),
        ({0: 1}, 1, 2, 1),
        ({0: 4}, 4, 2, 4),
        ({0: 1, 1: 4}, 1, 2, 4),
        ({0: 3, 1: 1}, 1, 2, 3),
        ({0: 5, 1: 4}, 1, 2, 5),
        ({0: 130, 1: 130}, 130, 2, 130),
        ({0: 130, 1: 1}, 1, 2, 1),
        ({0: 134, 1: 5}, 1, 2, 134),
        ({0: 75, 1: 2}, 2, 2, 2),
    ],
)
def test_worst_code(ranks: dict[int, int], launcher: int, world: int, code: int) -> None:
    assert worst_code(ranks, launcher, world) == code


@pytest.mark.parametrize(
    ("ranks", "launcher", "code"),
    [
        ({}, 255, 3),
        ({}, 0, 3),
        ({0: 1}, 255, 3),
        ({0: 4}, 255, 4),
        ({0: 0}, 255, 3),
        ({0: 0, 1: 0}, 255, 3),
        ({0: 75, 1: 75}, 255, 75),
        ({0: 1, 1: 1}, 255, 1),
    ],
)
def test_worst_code_with_a_lost_host(ranks: dict[int, int], launcher: int, code: int) -> None:
    assert worst_code(ranks, launcher, 2, lost=True) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_first_step_stops_and_loses_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Ranks that are still importing die of the signal: without a report, and without a loss."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    outcome, _ = run(tmp_path, "starting", signals=(number,))
    signal.signal(signal.SIGHUP, before)
    assert outcome.code == (130 if number == signal.SIGINT else 75) and outcome.rank_codes == {}
    assert outcome.stopped == "before the first step, nothing to save"


def test_a_rank_that_is_killed_before_the_first_step_was_not_stopped(tmp_path: Path) -> None:
    assert run(tmp_path, "starting_and_killed", QUICK)[0].code == 137


@pytest.mark.parametrize("name", ["run", "host"])
def test_ranks_tell_their_end_where_the_run_directory_cannot(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    outcome, _ = run(tmp_path / name, "full_disk")
    assert outcome.code == 2 and outcome.rank_codes == {0: 2, 1: 2}
    assert outcome.errors[0] == "checkpoint step-000002 could not be written"
    log = (tmp_path / name / "logs" / "launch.log").read_text()
    assert "hello from rank 1" in log and "slt-rank-report" not in log and "host: " not in log


def test_helpers_that_end_a_moment_later_are_nothing_to_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome, _ = run(tmp_path, "helper", Patience(leftover_seconds=0.1))
    assert outcome.code == 0 and not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_directory_that_cannot_be_written_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    command = Command(argv=(sys.executable, "-c", "raise SystemExit(9)"))
    message = r"/run/logs could not be written: Not a directory; nothing was started\. Free space"
    with pytest.raises(StorageError, match=message) as error:
        supervise(command, tmp_path / "run", ("x", 1))
    assert error.value.exit_code == 2


def test_a_log_on_a_full_disk_does_not_stop_the_ranks(caplog: pytest.LogCaptureFixture) -> None:
    """A reader that dies leaves them waiting at a full pipe for ever."""

    class Full(io.RawIOBase):
        def write(self, chunk: object) -> int:
            raise OSError(28, "No space left on device")

    seen: list[str] = []

    class Deaf(Output):
        def read(self, line: str) -> None:
            seen.append(line)

    Deaf(None).copy(io.BufferedReader(io.BytesIO(b"a\nb\n" * 50_000 + b"the end")), Full())  # type: ignore[arg-type]
    assert len(seen) == 100_001 and seen[-1] == "the end"
    Output(None).copy(io.BufferedReader(io.BytesIO(b"a\nb\n")), Full())  # type: ignore[arg-type]
    assert caplog.text.count("launch.log cannot be written ([Errno 28] No space left on device)") == 1


def reports(*ends: tuple[int, str]) -> dict[int, Report]:
    return {rank: Report(rank, code, "", stopped) for rank, (code, stopped) in enumerate(ends)}


SAVED, EARLY = "saved at step 3", "before the first step, nothing to save"


@pytest.mark.parametrize(
    ("ends", "seen", "code", "stopped"),
    [
        ([(75, SAVED), (75, SAVED)], Evidence(75, (15,), begun=True), 75, SAVED),
        ([(130, SAVED), (130, SAVED)], Evidence(130, (2,), begun=True), 130, SAVED),
        ([], Evidence(-15, (15,)), 75, EARLY),
        ([], Evidence(1, (2,)), 130, EARLY),
        ([(75, EARLY)], Evidence(75, (15,)), 75, EARLY),
        ([(75, EARLY), (3, "")], Evidence(75, (15,)), 75, EARLY),
        ([(1, ""), (75, EARLY)], Evidence(1, (15,), begun=True), 75, EARLY),
        ([(2, ""), (75, EARLY)], Evidence(1, (15,)), 2, ""),
        ([], Evidence(-15, (15,), begun=True), 143, ""),
        ([(75, SAVED)], Evidence(75, (15,), begun=True), 137, ""),
        ([], Evidence(-9, (15,), killed=True), 137, ""),
        ([(0, ""), (0, "")], Evidence(0, (15,)), 0, ""),
        ([(0, ""), (0, "")], Evidence(0, (15,), begun=True), 0, ""),
        ([], Evidence(-15), 143, ""),
    ],
)
def test_verdict_after_a_request_to_stop(ends: list[tuple[int, str]], seen: Evidence, code: int, stopped: str) -> None:
    outcome = verdict(reports(*ends), 2, seen)
    assert (outcome.code, outcome.stopped) == (code, stopped)


def test_a_rank_that_started_late_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal came when no rank was there; the one that comes up afterwards hears of it too."""
    asked: list[str] = []
    monkeypatch.setattr(supervision, "_REMIND_SECONDS", 0.05)
    monkeypatch.setattr(supervision, "signal_hosts", lambda command, launch_id, name, *flags: asked.append(name))
    script = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(1.2)"
    outcome = supervise(Command(argv=(sys.executable, "-c", script), remote=("true",)), tmp_path, ("x", 1), QUICK)
    assert outcome.code == 75 and asked.count("SIGTERM") >= 3


def test_what_a_dead_launcher_left_is_ended_and_its_ranks_save_first(tmp_path: Path) -> None:
    launch_id = uuid.uuid4().hex
    env = {**os.environ, LAUNCH_ID: launch_id}
    argv = [sys.executable, stubs.__file__, "launcher", str(tmp_path), "2", "save"]
    left = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("ready-*"))) < 2:
        time.sleep(0.02)
    end_orphans(launch_id, Command(argv=()), QUICK)
    left.wait(timeout=10)
    assert {rank: report.code for rank, report in read_reports(tmp_path / "logs").items()} == {0: 75, 1: 75}
    assert not list(find_processes(launch_id))


def test_ranks_that_a_dead_launcher_left_on_hosts_get_time_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are asked until they are gone; only what is left then is killed."""
    asked: list[str] = []
    there = [2, 1, 0]

    def signalled(command: Command, module: tuple[str, ...], failure: str) -> str:
        asked.append(module[2])
        reached = there.pop(0) if module[2] == "SIGTERM" else 0
        return "".join(f"{host}: SIGTERM sent to {n} processes of launch x\n" for host, n in (("a", reached), ("b", 0)))

    monkeypatch.setattr(processes, "run_on_hosts", signalled)
    patience = processes.Patience(grace_seconds=30, leftover_seconds=0.01)
    end_orphans("x", Command(argv=(), remote=("pdsh", "{command}")), patience)
    assert asked == ["SIGTERM", "SIGTERM", "SIGTERM", "SIGKILL"]


def test_damaged_reports_count_as_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, text in enumerate(['{"rank": 0, "code": 0}', "{", '{"rank": 2}', "[]", '{"rank": 4, "code": null}']):
        (tmp_path / f"exit-rank-{number}.json").write_text(text)
    assert read_reports(tmp_path) == {0: Report(0, 0)}
    assert caplog.text.count("is not a usable exit report") == 4
    assert read_reports(tmp_path, quiet=True) == {0: Report(0, 0)}
    assert caplog.text.count("is not a usable exit report") == 4


def test_stubs_report_like_ranks(tmp_path: Path) -> None:
    run(tmp_path, "ok", world=1)
    assert json.loads((tmp_path / "logs" / "exit-rank-0.json").read_text()) == {"rank": 0, "code": 0, "error": ""}
    assert psutil.Process().is_running()
