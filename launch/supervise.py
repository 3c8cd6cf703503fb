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
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from launch.backends import Command
from launch.hang import Hang, Limits, find_hang, resolved
from launch.output import Output
from launch.plan import LAUNCH_ID
from launch.processes import Patience, group_members, is_dead, run_on_hosts, signal_group, signal_hosts
from launch.ranks import find_processes, find_ranks, send
from launch.stacks import drop_empty, innermost, save_stacks
from launch.status import Journal, rank_states
from launch.stop import StopRequest
from launch.verdict import KILLED, Evidence, Outcome, Report, read_reports, verdict
from pipeline.errors import EXIT_OK, EXIT_PREEMPTED, ClusterError, StorageError, stop_signals

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0  # between looks at the ranks' reports, which may be on a busy shared disk
_REMIND_SECONDS = 5.0  # between requests to stop while ranks may still be starting
# Set by an outer launcher or an earlier run; if inherited, they would make every process think it is that rank.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Watch:
    """What the supervisor knows of a launch beside its command."""

    journal: Journal | None = None
    """Of the launch, which may have had other attempts; None = nobody reads one."""
    hosts: Mapping[int, str] = field(default_factory=dict)
    """Rank -> host, as the plan names it; a rank that is not among these says itself where it is."""
    limits: Limits = field(default_factory=Limits)
    """How long a rank may be silent, or stay where it is."""
    part: tuple[int, int] | None = None
    """Where every host has a launcher: this host's number, and how many ranks it starts."""


def supervise(
    command: Command,
    run_dir: Path,
    ranks: tuple[str, int],
    patience: Patience | None = None,
    watch: Watch | None = None,
) -> Outcome:
    """Start the command and stay until it and all its processes are gone. Call from the main thread.

    Args:
        command: from a backend.
        run_dir: holds ``logs/``; shared by all hosts.
        ranks: the launch id and the world size.
        patience: waiting times.
        watch: what else is known and kept.

    Raises:
        ClusterError: the command cannot be started.
    """
    watch = watch or Watch()
    log.info("a hang is: %s", ", ".join(f"{what} {text}" for what, text in resolved(watch.limits).items()))
    return _Supervisor(command, run_dir, ranks, patience or Patience(), watch).run()


def log_name(node_rank: int | None) -> str:
    """The log of a launcher: of several, each has its own, as two machines must not append to one file."""
    return f"launch-node-{node_rank}.log" if node_rank else "launch.log"


class _Supervisor:
    def __init__(
        self, command: Command, run_dir: Path, ranks: tuple[str, int], patience: Patience, watch: Watch
    ) -> None:
        self.command, self.patience, self.watch = command, patience, watch
        self.launch_id, self.world_size = ranks
        self.logs = run_dir / "logs"
        self.journal = watch.journal or Journal(run_dir, self.launch_id)
        self.output = Output(command.lost_host)
        self.received: list[int] = []
        self.handled = 0
        self.deadline: float | None = None
        self.obeyed: StopRequest | None = None
        self.failure_seen = False
        self.killed = False
        self.hang: Hang | None = None
        self.first_dead: int | None = None
        self.next_look = 0.0
        self.next_reminder = 0.0
        self.polled = time.monotonic()

    def run(self) -> Outcome:
        with self._signals():
            with self._open_log() as sink:
                process = self._start()
                tee = threading.Thread(target=self.output.copy, args=(process.stdout, sink), name="tee", daemon=True)
                tee.start()
                self.journal.set(state="running", world_size=self.world_size)
                self.journal.show_ranks(self._rank_states)
                try:
                    self._watch(process)
                finally:
                    self._clear(process)
                    tee.join(timeout=10)
                    drop_empty(self.logs)
            reports = self._reports()
            return verdict(reports, self._expected(reports), self._evidence(process.returncode))

    def _expected(self, reports: Mapping[int, Report]) -> int:
        """How many ranks must have reported; of those that others started, only some may have left a note yet."""
        if self.watch.part is None:
            return self.world_size
        return len(reports) + max(self.watch.part[1] - len(self.output.reports), 0)

    def _evidence(self, launcher_code: int) -> Evidence:
        return Evidence(
            launcher_code,
            signals=tuple(self.received),
            begun=self.output.begun,
            killed=self.killed,
            lost_hosts=tuple(self.output.lost),
            hang=self.hang,
            first_dead=self.first_dead,
            beats=self.output.pulses.last,
            stacks=innermost(self.logs, self.hang.ranks[0]) if self.hang is not None else (),
        )

    def _rank_states(self) -> dict[str, Any]:
        return rank_states(self.output.pulses, self.watch.hosts, time.monotonic())

    def _open_log(self) -> IO[bytes]:
        """Make the run directory ready for this launch; returns its log.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            if self.watch.part is None:  # else they may be of ranks that other launchers have started already
                for stale in self.logs.glob("exit-rank-*.json"):
                    stale.unlink()
            return (self.logs / log_name(self.watch.part and self.watch.part[0])).open("ab", buffering=0)
        except OSError as error:
            raise StorageError(
                f"run directory: {error.filename or self.logs} could not be written: {error.strerror}; nothing was "
                "started. Free space, or choose another one with --run-dir"
            ) from error

    def _reports(self, quiet: bool = False) -> dict[int, Report]:
        return self.output.reports | read_reports(self.logs, quiet)  # a line is short, a file holds the whole error

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
            self._allow_for_a_pause()
            self._obey_requests(process)
            self._find_first_dead()
            if self.output.lost and not self.failure_seen:
                # the ranks of the other hosts would wait for the timeout of a collective
                log.error("the connection to %s is lost; stopping the other hosts", ", ".join(self.output.lost))
                self._fail(self.patience.leftover_seconds)
            if not self.failure_seen and time.monotonic() >= self.next_look:
                self.next_look = time.monotonic() + _LOOK_SECONDS
                if self._rank_failed():
                    self._fail(self.patience.failure_seconds)
                elif not self.received and not self.output.writing:
                    self._look_for_hang()
            if self.deadline is not None and time.monotonic() > self.deadline:
                if not self.failure_seen:
                    self._save_stacks()
                if self.hang is None:
                    log.error("ranks did not leave in time; killing what is left")
                self._kill(process)
                self.deadline = None

    def _fail(self, seconds: float) -> None:
        """Something failed: the ranks have so many seconds to leave."""
        self.failure_seen = True
        self.journal.set(state="stopping")
        self._set_deadline(seconds)

    def _allow_for_a_pause(self) -> None:
        """Whoever stops this process, or its machine, for a while must not make all ranks look silent."""
        now = time.monotonic()
        pause, self.polled = now - self.polled - _POLL_SECONDS, now
        if pause > _LOOK_SECONDS:
            self.output.pulses.forgive(pause)

    def _obey_requests(self, process: subprocess.Popen[bytes]) -> None:
        request = self.journal.request
        if request is not None and request != self.obeyed:
            self.obeyed = request
            log.warning("stop requested by %s%s", request.who, ", without saving" if request.now else "")
            self.received.append(signal.SIGTERM)
            if request.now:
                self.handled = len(self.received)
                self._kill(process)
        while self.handled < len(self.received):
            self._pass_on(process, self.received[self.handled])
            self.handled += 1
        if self.handled and not self.output.begun and time.monotonic() >= self.next_reminder:
            self._remind()

    def _look_for_hang(self) -> None:
        pulses, ended = self.output.pulses, self._reports(quiet=True)
        self.hang = find_hang(pulses, ended, self.watch.limits, time.monotonic())
        if self.hang is not None:
            log.error("rank %s: %s; stopping all", ",".join(map(str, self.hang.ranks)), self.hang)
            self._save_stacks()
            self._fail(0)

    def _save_stacks(self) -> None:
        """What the ranks are doing, before they are killed."""
        logs = self.logs.absolute()
        if self.command.remote is not None:
            module = ("launch.stacks", self.launch_id, str(logs))
            run_on_hosts(self.command, module, "stacks could not be asked of all hosts")
        else:
            save_stacks(self.launch_id, logs)

    def _find_first_dead(self) -> None:
        """The launcher ends the others of a host as soon as one rank dies: only who looks at once sees which it was."""
        if self.first_dead is not None or self.command.remote is not None:
            return
        for rank, beat in self.output.pulses.last.items():
            if is_dead(beat.pid) and rank not in self._reports(quiet=True):
                self.first_dead = rank
                self._fail(self.patience.failure_seconds)
                return

    def _pass_on(self, process: subprocess.Popen[bytes], number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.received[: self.handled].count(signal.SIGINT):
            log.warning("second %s: killing all ranks without saving", name)
            self._kill(process)
            return
        log.warning("%s: passed on to the ranks, which have %.0f s to save", name, self.patience.grace_seconds)
        if number == signal.SIGHUP:  # other hosts may ignore it
            number, name = signal.SIGTERM, "SIGTERM"
        self.journal.set(state="stopping")
        self._set_deadline(self.patience.grace_seconds)
        self.next_reminder = time.monotonic() + _REMIND_SECONDS
        if self.command.remote is not None:
            self._remote(name)
        elif not send(find_ranks(self.launch_id), number):
            log.warning("no rank is running yet; stopping the launcher")
            signal_group(process.pid, signal.SIGTERM)

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
        self.killed = self.output.we_kill = True
        if self.command.remote is not None:
            self._remote("SIGKILL", "--all")
        signal_group(process.pid, signal.SIGKILL)

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
        processes = {process.pid: process for process in group_members(group)}
        if self.command.remote is None:
            processes.update((process.pid, process) for process in find_processes(self.launch_id))
        return list(processes.values())

    def _remote(self, name: str, *flags: str) -> None:
        signal_hosts(self.command, self.launch_id, name, *flags)

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


__all__ = ["KILLED", "Outcome", "Patience", "Watch", "log_name", "supervise"]
