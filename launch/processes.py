"""Signals and ends the processes of a launch, on this machine and on its hosts."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from launch.backends import Command
from launch.carry import HostCommand, shell_line
from launch.ranks import REACHED, find_processes, find_ranks, send
from pipeline.config.load import PROJECT_ROOT

log = logging.getLogger(__name__)

_REMOTE_SECONDS = 60.0  # limit of one call to all hosts; a lost host must not hold up the others


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait before force."""

    grace_seconds: float = 300.0
    """For all ranks to save and leave after a signal."""
    failure_seconds: float = 30.0
    """For the other ranks to leave after one has failed."""
    leftover_seconds: float = 5.0
    """For processes that outlive the launcher, and for ranks whose peers were on a lost host."""


def signal_hosts(command: Command, launch_id: str, name: str, *flags: str) -> int:
    """Signal the ranks of a launch (``--all``: every process of it) on all hosts of a command; returns how many
    processes say that they were reached."""
    module = ("launch.ranks", launch_id, name, *flags)
    said = run_on_hosts(command, module, f"{name} could not be sent to all hosts")
    return sum(map(int, re.findall(REACHED.format(name, r"(\d+)", launch_id), said)))


def run_on_hosts(command: Command, module: tuple[str, ...], failure: str) -> str:
    """Run a module of ours with its arguments on all hosts of a command; logs ``failure`` where one fails. Returns what
    the hosts wrote to stderr."""
    ask = HostCommand((sys.executable, "-m", *module), folder=PROJECT_ROOT)
    try:
        done = subprocess.run(
            command.on_hosts(shell_line(ask)), env={**os.environ, **command.env}, timeout=_REMOTE_SECONDS, check=False,
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal must not end what carries it
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        log.error("%s: %s", failure, error)
        return ""
    if done.returncode:
        log.error("%s: %s", failure, done.stderr.strip() or f"exit {done.returncode}")
    return done.stderr


def end_orphans(launch_id: str, command: Command, patience: Patience) -> None:
    """End the processes of a launch whose launcher is gone: its ranks get time to save, the rest is killed."""
    end = time.monotonic() + patience.grace_seconds
    there = command.remote is not None and signal_hosts(command, launch_id, "SIGTERM")
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
    if there:
        log.warning(
            "%d ranks of launch %s run on its hosts without their launcher; they have %.0f s to save and stop",
            there, launch_id, max(end - time.monotonic(), 0.0),
        )  # fmt: skip
    while there and time.monotonic() < end:
        time.sleep(patience.leftover_seconds)
        there = signal_hosts(command, launch_id, "SIGTERM")
    if command.remote is not None:
        signal_hosts(command, launch_id, "SIGKILL", "--all")


def group_members(group: int) -> Iterator[psutil.Process]:
    """Live processes of a process group."""
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (OSError, psutil.Error):
            continue


def signal_group(group: int, number: int) -> None:
    """Signal a process group that may be gone already."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        log.debug("process group %d is gone already", group)


def is_dead(pid: int) -> bool:
    """Whether a process of this machine has ended, reaped or not."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


__all__ = ["Patience", "end_orphans", "group_members", "is_dead", "run_on_hosts", "signal_group", "signal_hosts"]
