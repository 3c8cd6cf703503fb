"""Runs a launch command: copies its output, passes signals on, stops all ranks if one fails, reports how it ended.

A signal sent to DeepSpeed's launcher (0.19.8) reaches the ranks one by one, 30 s apart; sent to the process group, it
kills the loader workers that the ranks need. So signals go only to the rank processes, all at once, and the ranks get
time to save. What then remains of our process group is killed.

Each rank reports how it ended in ``<run_dir>/logs/exit-rank-N.json`` (``{"rank": 0, "code": 75, "error": "..."}``) and
on its output (`launch.notes`): launchers reduce exit codes to 1 or lose them, and a full disk takes no file.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from launch import notes
from launch.backends import Command
from launch.carry import HostCommand, shell_line
from launch.plan import LAUNCH_ID
from launch.ranks import find_processes, find_ranks, send
from launch.verdict import KILLED, Evidence, Outcome, Report, read_reports, verdict, worst_code
from pipeline.config.load import PROJECT_ROOT
from pipeline.errors import EXIT_OK, EXIT_PREEMPTED, ClusterError, StorageError, stop_signals

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0  # between looks at the ranks' reports, which may be on a busy shared disk
_REMIND_SECONDS = 5.0  # between requests to stop while ranks may still be starting
_REMOTE_SECONDS = 60.0  # limit of one pdsh call; a lost host must not hold up the others
# Set by an outer launcher or an earlier run; if inherited, they would make every process think it is that rank.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait before force."""

    grace_seconds: float = 300.0
    """For all ranks to save and leave after a signal."""
    failure_seconds: float = 30.0
    """For the other ranks to leave after one has failed."""
    leftover_seconds: float = 5.0
    """For processes that outlive the launcher, and for ranks whose peers were on a lost host."""


def supervise(command: Command, run_dir: Path, ranks: tuple[str, int], patience: Patience | None = None) -> Outcome:
    """Start the command and stay until it and all its processes are gone. Call from the main thread.

    Args:
        command: from a backend.
        run_dir: holds ``logs/``; shared by all hosts.
        ranks: the launch id and the world size.
        patience: waiting times.

    Raises:
        ClusterError: the command cannot be started.
    """
    return _Supervisor(command, run_dir, ranks, patience or Patience()).run()


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
        self.next_reminder = 0.0
        self.lost: list[str] = []
        self.rank_reports: dict[int, Report] = {}
        self.begun = False

    def run(self) -> Outcome:
        with self._signals():
            with self._open_log() as sink:
                process = self._start()
                tee = threading.Thread(target=_tee, args=(process.stdout, sink, self._read), name="tee", daemon=True)
                tee.start()
                try:
                    self._watch(process)
                finally:
                    self._clear(process)
                    tee.join(timeout=10)
            lost, signals = tuple(self.lost), tuple(self.received)
            seen = Evidence(process.returncode, signals, self.begun, self.killed, lost)
            return verdict(self._reports(), self.world_size, seen)

    def _open_log(self) -> IO[bytes]:
        """Make the run directory ready for this launch; returns its log.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            for stale in self.logs.glob("exit-rank-*.json"):
                stale.unlink()
            return (self.logs / "launch.log").open("ab", buffering=0)
        except OSError as error:
            raise StorageError(
                f"run directory: {error.filename or self.logs} could not be written: {error.strerror}; nothing was "
                "started. Free space, or choose another one with --run-dir"
            ) from error

    def _reports(self, quiet: bool = False) -> dict[int, Report]:
        return read_reports(self.logs, quiet) | self.rank_reports

    def _start(self) -> subprocess.Popen[bytes]:
        env = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
        env.update(self.command.env)
        if self.command.remote is None:  # ranks on other hosts get it there; pdsh here must not count as one of them
            env[LAUNCH_ID] = self.launch_id
        try:
            # in a new session, a Ctrl-C in the terminal reaches only this process, which passes it on
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
            if self.handled and not self.begun and time.monotonic() >= self.next_reminder:
                self._remind()
            if self.lost and not self.failure_seen:
                # the ranks of the other hosts would wait for the timeout of a collective
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

    def _read(self, line: str) -> str | None:
        """A line of the launcher's output -> the text to show, None for nothing; called by the thread that copies the
        output."""
        shown, report = notes.read(line)
        if report is not None:
            self.begun = self.begun or bool(report.get("begun"))
            if "code" in report:
                rank_report = Report.read(report)
                self.rank_reports[rank_report.rank] = rank_report
            return shown if self._has_text(shown) else None
        # connections also end when we kill
        if self.command.lost_host is not None and not self.killed and (match := re.match(self.command.lost_host, line)):
            self.lost.append(match[1])
        return line

    def _has_text(self, rest: str) -> bool:
        """Whether a line has text before its report, other than the host's name that pdsh adds."""
        return bool(rest) and re.fullmatch(r"\S+: ", rest) is None

    def _pass_on(self, process: subprocess.Popen[bytes], number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.received[: self.handled].count(signal.SIGINT):
            log.warning("second %s: killing all ranks without saving", name)
            self._kill(process)
            return
        log.warning("%s: passed on to the ranks, which have %.0f s to save", name, self.patience.grace_seconds)
        if number == signal.SIGHUP:  # other hosts may ignore it
            number, name = signal.SIGTERM, "SIGTERM"
        self._set_deadline(self.patience.grace_seconds)
        self.next_reminder = time.monotonic() + _REMIND_SECONDS
        if self.command.remote is not None:
            self._remote(name)
        elif not send(find_ranks(self.launch_id), number):
            log.warning("no rank is running yet; stopping the launcher")
            _signal_group(process.pid, signal.SIGTERM)

    def _remind(self) -> None:
        """Ask again until training has begun: ranks may have started after the signal was passed on."""
        self.next_reminder = time.monotonic() + _REMIND_SECONDS
        if self.command.remote is not None:
            self._remote("SIGTERM")
        else:
            send(find_ranks(self.launch_id), signal.SIGTERM)

    def _set_deadline(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)

    def _rank_failed(self) -> bool:
        return any(report.code not in (EXIT_OK, EXIT_PREEMPTED) for report in self._reports(quiet=True).values())

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        self.killed = True
        if self.command.remote is not None:
            self._remote("SIGKILL", "--all")
        _signal_group(process.pid, signal.SIGKILL)

    def _clear(self, process: subprocess.Popen[bytes]) -> None:
        """End everything that this launch has left running, on every host."""
        if process.poll() is None:  # an exception is propagating
            self._kill(process)
            process.wait()
        failed = process.returncode != 0
        if self.command.remote is not None and failed:
            self._remote("SIGKILL", "--all")
        end = time.monotonic() + self.patience.leftover_seconds
        while (left := self._remaining(process.pid)) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        # mostly helpers of a rank (loader workers and their starter), which end a moment after it; a rank killed here
        # counts as one without a report
        log.debug("%d processes are left and killed", len(left))
        send(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=10)

    def _remaining(self, group: int) -> list[psutil.Process]:
        processes = {process.pid: process for process in _group_members(group)}
        if self.command.remote is None:
            processes.update((process.pid, process) for process in find_processes(self.launch_id))
        return list(processes.values())

    def _remote(self, name: str, *flags: str) -> None:
        _signal_hosts(self.command, self.launch_id, name, *flags)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: Any) -> None:
            self.received.append(number)

        before = {number: signal.signal(number, note) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def end_orphans(launch_id: str, command: Command, patience: Patience) -> None:
    """End the processes of a launch whose launcher is gone: its ranks get time to save, the rest is killed."""
    if command.remote is not None:
        _signal_hosts(command, launch_id, "SIGTERM")
    if ranks := find_ranks(launch_id):
        log.warning(
            "%d ranks of launch %s run without their launcher; they have %.0f s to save and stop",
            len(ranks), launch_id, patience.grace_seconds,
        )  # fmt: skip
        send(ranks, signal.SIGTERM)
        psutil.wait_procs(ranks, timeout=patience.grace_seconds)
    left = list(find_processes(launch_id))
    send(left, signal.SIGKILL)
    psutil.wait_procs(left, timeout=10)
    if command.remote is not None:
        time.sleep(patience.leftover_seconds)
        _signal_hosts(command, launch_id, "SIGKILL", "--all")


def _signal_hosts(command: Command, launch_id: str, name: str, *flags: str) -> None:
    """Signal the ranks of a launch (``--all``: every process of it) on all hosts of a command."""
    ask = HostCommand((sys.executable, "-m", "launch.ranks", launch_id, name, *flags), folder=PROJECT_ROOT)
    try:
        done = subprocess.run(
            command.on_hosts(shell_line(ask)), env={**os.environ, **command.env}, timeout=_REMOTE_SECONDS, check=False,
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        log.error("%s could not be sent to all hosts: %s", name, error)
        return
    if done.returncode:
        log.error("%s could not be sent to all hosts: %s", name, done.stderr.strip() or f"exit {done.returncode}")


def _tee(source: IO[bytes] | None, sink: IO[bytes], read: Callable[[str], str | None]) -> None:
    """Copy output line by line, as ``read`` returns it, to the log and to stderr, until its end.

    A closed stderr or a full disk stops only that copy: ranks must never wait for a reader.
    """
    assert source is not None
    copies: list[tuple[IO[bytes], str]] = [
        (sink, "the run directory's launch.log cannot be written (%s); output goes to stderr only"),
        (sys.stderr.buffer, "stderr is closed (%s); output goes to the log only"),
    ]
    rest = b""
    while True:
        chunk = source.read1(65536)  # type: ignore[attr-defined]
        *lines, rest = (rest + chunk).split(b"\n")
        if not chunk and rest:
            lines.append(rest)
        shown = (read(line.decode(errors="surrogateescape")) for line in lines)
        text = "".join(f"{line}\n" for line in shown if line is not None).encode(errors="surrogateescape")
        for copy in [*copies] if text else []:
            try:
                copy[0].write(text)
                copy[0].flush()
            except (OSError, ValueError) as error:
                copies.remove(copy)
                log.warning(copy[1], error)
        if not chunk:
            return


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
