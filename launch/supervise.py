"""Run a launch command to its end: tee its output, pass signals on, stop all ranks when one fails, say how it ended.

What a signal must not do: at DeepSpeed's launcher (0.19.8) it reaches the ranks one by one, 30 s apart; at the process
group it kills the loader workers under the ranks' feet. So signals go to the rank processes alone, all at once, and the
ranks get time to save. Whatever is left of our own process group after that is killed.

Each rank writes how it ended to ``<run_dir>/logs/exit-rank-N.json`` (``{"rank": 0, "code": 75, "error": "..."}``);
launchers reduce exit codes to 1 or lose them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from launch.backends import Command
from launch.carry import HostCommand, shell_line
from launch.plan import LAUNCH_ID
from launch.ranks import find_processes, find_ranks, send
from pipeline.config.load import PROJECT_ROOT
from pipeline.errors import EXIT_CLUSTER, EXIT_OK, EXIT_PREEMPTED, ClusterError

log = logging.getLogger(__name__)

KILLED = 128 + signal.SIGKILL
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0  # between looks at the ranks' reports, which may lie on a busy shared disk
_REMOTE_SECONDS = 60.0  # limit of one pdsh call; a lost host must not hold up the others
# Set by an outer launcher or an earlier run; inherited by mistake they would make every process think it is that rank.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
# From harmless to telling: when one rank fails the others lose their connection and end with 1 or 3, so a code that
# says more than that is the cause.
_SEVERITY = (0, 75, 130, 1, 3, 2, 4, 5)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait before force."""

    grace_seconds: float = 300.0
    """For all ranks to save and leave after a signal."""
    failure_seconds: float = 30.0
    """For the other ranks to leave after one has failed."""
    leftover_seconds: float = 5.0
    """For processes that outlive the launcher, and for ranks whose peers were on a lost host."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a launch ended."""

    code: int
    """Exit code of the launch, see `worst_code`."""
    launcher_code: int
    rank_codes: dict[int, int] = field(default_factory=dict)
    """Ranks that reported; a missing rank was killed."""
    errors: dict[int, str] = field(default_factory=dict)
    signals: tuple[int, ...] = ()
    """Signals received and passed on."""
    lost_hosts: tuple[str, ...] = ()
    """Hosts to which the connection broke, or where what starts the ranks was killed: ssh reports both alike."""


def supervise(command: Command, run_dir: Path, ranks: tuple[str, int], patience: Patience | None = None) -> Outcome:
    """Start the command and stay until it and all its processes are gone. Call from the main thread.

    Args:
        command: from a backend.
        run_dir: where ``logs/`` is kept; shared by all hosts.
        ranks: the launch id and the world size.
        patience: waiting times.

    Raises:
        ClusterError: the command cannot be started.
    """
    return _Supervisor(command, run_dir, ranks, patience or Patience()).run()


def worst_code(rank_codes: Mapping[int, int], launcher_code: int, world_size: int, lost: bool = False) -> int:
    """One exit code for the launch: 0 and 75 only when every rank agrees, a death by signal as 128+n.

    A rank without a report was killed. If the launcher saw a signal first, that is the cause; if another rank reported
    a failure, that rank is, and the silent one was stopped because of it. A launcher that fails before any rank
    reports is a cluster problem, and so is a ``lost`` connection to a host: its ranks are silent for that reason.
    """
    death = 0 if lost else _signal_death(launcher_code)
    failures = [code for code in rank_codes.values() if code not in (EXIT_OK, EXIT_PREEMPTED)]
    silent = len(rank_codes) < world_size
    if silent and lost:
        failures.append(EXIT_CLUSTER)
    if silent and death:
        return death
    if failures:
        return max(failures, key=_severity)
    if silent:
        nobody_started = not rank_codes and launcher_code > 0
        return EXIT_CLUSTER if nobody_started else KILLED
    if EXIT_PREEMPTED in rank_codes.values():
        return EXIT_PREEMPTED
    return death or (EXIT_CLUSTER if lost else launcher_code)  # 0, unless something broke after the last report


def _severity(code: int) -> int:
    return _SEVERITY.index(code) if code in _SEVERITY else len(_SEVERITY) + code


def _signal_death(launcher_code: int) -> int:
    """128+n when the launcher died by signal n or passed on that a rank did; else 0."""
    if launcher_code < 0:
        return 128 - launcher_code
    if launcher_code > 192:  # DeepSpeed exits with the rank's -n, which the system shows as 256-n
        return 128 + 256 - launcher_code
    return launcher_code if launcher_code > 128 and launcher_code != 130 else 0


class _Supervisor:
    def __init__(self, command: Command, run_dir: Path, ranks: tuple[str, int], patience: Patience) -> None:
        self.command, self.patience = command, patience
        self.launch_id, self.world_size = ranks
        self.logs = run_dir / "logs"
        self.received: list[int] = []
        self.handled = 0
        self.deadline: float | None = None
        self.failure_seen = False
        self.killed = False
        self.next_look = 0.0
        self.lost: list[str] = []

    def run(self) -> Outcome:
        self.logs.mkdir(parents=True, exist_ok=True)
        for stale in self.logs.glob("exit-rank-*.json"):
            stale.unlink()
        with (self.logs / "launch.log").open("ab") as sink, self._signals():
            process = self._start()
            tee = threading.Thread(target=_tee, args=(process.stdout, sink, self._read), name="tee", daemon=True)
            tee.start()
            try:
                self._watch(process)
            finally:
                self._clear(process)
                tee.join(timeout=10)
        codes, errors = read_reports(self.logs)
        # how the launcher ended says nothing about the cause once we have killed it
        code = worst_code(codes, 0 if self.killed else process.returncode, self.world_size, bool(self.lost))
        return Outcome(code, process.returncode, codes, errors, tuple(self.received), tuple(self.lost))

    def _start(self) -> subprocess.Popen[bytes]:
        env = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        env.update(self.command.env)
        try:
            # an own session: a Ctrl-C in the terminal reaches this process alone, which passes it on properly
            return subprocess.Popen(
                self.command.argv, env=env, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
        except OSError as error:
            raise ClusterError(f"cannot start {self.command.argv[0]}: {error.strerror}") from error

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            while self.handled < len(self.received):
                self._pass_on(process, self.received[self.handled])
                self.handled += 1
            if self.lost and not self.failure_seen:
                # nobody will answer the ranks of the other hosts, which would wait for a collective's timeout
                log.error("the connection to %s is lost; stopping the other hosts", ", ".join(self.lost))
                self.failure_seen = True
                self._set_deadline(self.patience.leftover_seconds)
            if not self.failure_seen and time.monotonic() >= self.next_look:
                self.next_look = time.monotonic() + _LOOK_SECONDS
                if self._rank_failed():
                    self.failure_seen = True
                    self._set_deadline(self.patience.failure_seconds)
            if self.deadline is not None and time.monotonic() > self.deadline:
                log.error("ranks did not leave in time; killing what is left")
                self._kill(process)
                self.deadline = None

    def _read(self, line: str) -> None:
        """A line of the launcher's output; called by the thread that copies it."""
        if self.command.lost_host is None or self.killed:  # what we kill ends its connection, too
            return
        if match := re.match(self.command.lost_host, line):
            self.lost.append(match[1])

    def _pass_on(self, process: subprocess.Popen[bytes], number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.received[: self.handled].count(signal.SIGINT):
            log.warning("second %s: killing all ranks without saving", name)
            self._kill(process)
            return
        log.warning("%s: passed on to the ranks, which have %.0f s to save", name, self.patience.grace_seconds)
        self._set_deadline(self.patience.grace_seconds)
        if self.command.remote is not None:
            self._remote(name)
        elif not send(find_ranks(self.launch_id), number):
            log.warning("no rank is running yet; stopping the launcher")
            _signal_group(process.pid, signal.SIGTERM)

    def _set_deadline(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)

    def _rank_failed(self) -> bool:
        return any(code not in (EXIT_OK, EXIT_PREEMPTED) for code in read_reports(self.logs, quiet=True)[0].values())

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        self.killed = True
        if self.command.remote is not None:
            self._remote("SIGKILL", "--all")
        _signal_group(process.pid, signal.SIGKILL)

    def _clear(self, process: subprocess.Popen[bytes]) -> None:
        """After the launcher: nothing of this launch may stay behind, on any host."""
        if process.poll() is None:  # an exception is on its way up
            self._kill(process)
            process.wait()
        failed = process.returncode != 0
        if self.command.remote is not None and failed:
            self._remote("SIGKILL", "--all")
        end = time.monotonic() + self.patience.leftover_seconds
        while (left := self._leftover(process.pid)) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        if left:
            log.warning("%d processes outlived the launcher and are killed", len(left))
            send(left, signal.SIGKILL)
            psutil.wait_procs(left, timeout=10)

    def _leftover(self, group: int) -> list[psutil.Process]:
        found = {process.pid: process for process in _group_members(group)}
        if self.command.env.get(LAUNCH_ID) == self.launch_id:
            found.update((process.pid, process) for process in find_processes(self.launch_id))
        return list(found.values())

    def _remote(self, name: str, *flags: str) -> None:
        assert self.command.remote is not None
        argv = (sys.executable, "-m", "launch.ranks", self.launch_id, name, *flags)
        shell = shell_line(HostCommand(argv, folder=PROJECT_ROOT))
        everywhere = [shell if part == "{command}" else part for part in self.command.remote]
        try:
            done = subprocess.run(
                everywhere, env={**os.environ, **self.command.env}, timeout=_REMOTE_SECONDS, check=False,
                capture_output=True, text=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            log.error("%s could not be sent to all hosts: %s", name, error)
            return
        if done.returncode:
            log.error("%s could not be sent to all hosts: %s", name, done.stderr.strip() or f"exit {done.returncode}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            self.received.append(number)

        before = {number: signal.signal(number, note) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def read_reports(logs: Path, quiet: bool = False) -> tuple[dict[int, int], dict[int, str]]:
    """Exit codes and error texts the ranks have reported so far. A damaged report counts as none."""
    codes: dict[int, int] = {}
    errors: dict[int, str] = {}
    for path in sorted(logs.glob("exit-rank-*.json")):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            rank, code = int(report["rank"]), int(report["code"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not quiet:  # while ranks run, a report may be half written
                log.warning("%s is not a usable exit report (%s); its rank counts as killed", path, error)
            continue
        codes[rank] = code
        if report.get("error"):
            errors[rank] = str(report["error"])
    return codes, errors


def _tee(source: IO[bytes] | None, sink: IO[bytes], read: Callable[[str], None]) -> None:
    """Copy output to the log, to stderr and, by lines, to ``read`` until its end; a closed stderr stops only itself."""
    assert source is not None
    echo, rest = True, b""
    while chunk := source.read1(65536):  # type: ignore[attr-defined]
        sink.write(chunk)
        sink.flush()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            read(line.decode(errors="replace"))
        if echo:
            try:
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()
            except (OSError, ValueError):
                echo = False
                log.warning("stderr is closed; output goes to the log only")


def _group_members(group: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (OSError, psutil.Error):
            continue


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        log.debug("process group %d is gone already", group)


__all__ = ["KILLED", "Outcome", "Patience", "read_reports", "supervise", "worst_code"]
