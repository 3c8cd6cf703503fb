"""Finds and signals the processes of one launch on this host: ``python -m launch.ranks LAUNCH_ID SIGNAL [--all]``.

Every process of a launch has the launch id in its environment. Ranks are processes with RANK whose parent has none;
loader workers inherit RANK from their rank and must not be signalled: a rank whose worker dies loses its step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import psutil

from launch.plan import LAUNCH_ID

REACHED = "{} sent to {} processes of launch {}"
"""What a host says of a signal: its name, how many got it, the launch."""


def find_processes(launch_id: str) -> Iterator[psutil.Process]:
    """Live processes of a launch on this host, except the calling one."""
    for process in psutil.process_iter():
        if process.pid != os.getpid() and _variable(process, LAUNCH_ID) == launch_id:
            yield process


def find_ranks(launch_id: str) -> list[psutil.Process]:
    """The rank processes of a launch on this host, without launchers above and loader workers below them."""
    marked = {process.pid: process for process in find_processes(launch_id)}
    with_rank = {pid for pid, process in marked.items() if _variable(process, "RANK")}
    ranks = []
    for pid in sorted(with_rank):
        try:
            parent = marked[pid].ppid()
        except psutil.NoSuchProcess:
            continue
        if parent not in with_rank:
            ranks.append(marked[pid])
    return ranks


def number_of(rank: psutil.Process) -> int:
    """RANK of a rank's process; -1 if it has just ended."""
    return int(_variable(rank, "RANK") or -1)


def send(processes: list[psutil.Process], number: int) -> int:
    """Signal processes that may be gone already; returns how many were reached."""
    reached = 0
    for process in processes:
        try:
            process.send_signal(number)
            reached += 1
        except psutil.NoSuchProcess:
            continue
    return reached


def _variable(process: psutil.Process, name: str) -> str | None:
    """An environment variable of a process; None for processes that are gone, dead or another user's."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.environ().get(name)
    except (psutil.Error, OSError):
        return None


def main(arguments: list[str]) -> int:
    """Exit code 0 if the arguments are valid, even if no process was left to signal."""
    if len(arguments) < 2 or not hasattr(signal, arguments[1]):
        sys.stderr.write("usage: python -m launch.ranks LAUNCH_ID SIGTERM|SIGKILL|... [--all]\n")
        return 2
    launch_id, number = arguments[0], int(getattr(signal, arguments[1]))
    chosen = list(find_processes(launch_id)) if "--all" in arguments[2:] else find_ranks(launch_id)
    reached = send(chosen, number)
    sys.stderr.write(REACHED.format(arguments[1], reached, launch_id) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

__all__ = ["find_processes", "find_ranks", "main", "number_of", "send"]
