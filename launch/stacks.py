"""Python stacks of the ranks of this host, for a report of a hang: ``python -m launch.stacks LAUNCH_ID LOGS``.

A rank's are in ``LOGS/stacks-rank-N.txt``. py-spy (the extra ``stacks``) reads them from outside, also of a process
that is stopped. Where it is missing or not allowed, ranks write their own on SIGUSR2 (`write_on_signal`), which a
stopped process cannot.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from launch.ranks import find_ranks, number_of, send
from shards.atomic import write_atomic

log = logging.getLogger(__name__)

SIGNAL = signal.SIGUSR2
_DUMP_SECONDS = 10.0
_WRITE_SECONDS = 3.0
_SHOWN_LINES = 5


def stacks_file(logs: Path, rank: int) -> Path:
    """Where the stacks of a rank are."""
    return logs / f"stacks-rank-{rank}.txt"


@contextlib.contextmanager
def write_on_signal(logs: Path, rank: int) -> Iterator[None]:
    """While it lasts, SIGUSR2 makes this process write the stacks of all its threads."""
    path = stacks_file(logs, rank)
    try:
        file = path.open("a", encoding="utf-8")  # those of an earlier attempt stay
    except OSError as error:  # training can go on, and a save will tell
        log.warning("%s could not be written: %s; a hang will show no stacks", path, error.strerror)
        yield
        return
    with file:
        faulthandler.register(SIGNAL, file=file, all_threads=True, chain=False)
        try:
            yield
        finally:
            faulthandler.unregister(SIGNAL)


def drop_empty(logs: Path) -> None:
    """Remove files that ranks have opened and nobody asked for."""
    for path in logs.glob("stacks-rank-*.txt"):
        with contextlib.suppress(FileNotFoundError):
            if not path.stat().st_size:
                path.unlink()


def save_stacks(launch_id: str, logs: Path) -> list[int]:
    """Write the stacks of all ranks of a launch that run on this host; returns the ranks whose stacks there are."""
    ranks = {number_of(process): process for process in find_ranks(launch_id)}
    with ThreadPoolExecutor(max_workers=max(len(ranks), 1)) as pool:
        saved = pool.map(lambda rank: _save(ranks[rank], stacks_file(logs, rank)), ranks)
        return sorted(rank for rank, done in zip(ranks, saved, strict=True) if done)


def _save(process: psutil.Process, path: Path) -> bool:
    text = _from_outside(process)
    if text:
        write_atomic(path, text)
        return True
    before = path.stat().st_size if path.exists() else 0
    send([process], SIGNAL)
    end = time.monotonic() + _WRITE_SECONDS
    while time.monotonic() < end:
        if path.exists() and path.stat().st_size > before:
            time.sleep(0.2)  # to its end
            return True
        time.sleep(0.1)
    return False


def _from_outside(process: psutil.Process) -> str:
    """What py-spy says; empty without it or without the right to look."""
    beside = Path(sys.executable).parent / "py-spy"
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return ""
    try:
        # py-spy cannot stop a process that is stopped already, and needs not
        still = ["--nonblocking"] if process.status() == psutil.STATUS_STOPPED else []
        done = subprocess.run(
            [program, "dump", *still, "--pid", str(process.pid)], capture_output=True, text=True,
            timeout=_DUMP_SECONDS, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired, psutil.NoSuchProcess) as error:
        log.warning("py-spy told nothing of process %d: %s", process.pid, error)
        return ""
    if done.returncode:
        log.warning("py-spy told nothing of process %d: %s", process.pid, done.stderr.strip())
        return ""
    return done.stdout


def innermost(logs: Path, rank: int) -> tuple[str, ...]:
    """The innermost lines of the main thread of a rank, and where all its stacks are; empty if nothing was saved."""
    path = stacks_file(logs, rank)
    if not path.exists():
        return ()
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.findall(r'^(?:Thread .*"MainThread".*|Current thread .*)\n((?:[ \t]+.*\n?)+)', text, flags=re.MULTILINE)
    lines = [line.strip() for line in found[-1].splitlines()[:_SHOWN_LINES]] if found else []
    return (*lines, f"all stacks: {path.with_name('stacks-rank-*.txt')}") if text else ()


def main(arguments: list[str]) -> int:
    """Exit code 0 if the arguments are valid, even if there is no rank to look at."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m launch.stacks LAUNCH_ID LOGS\n")
        return 2
    sys.stderr.write(f"stacks of ranks {save_stacks(arguments[0], Path(arguments[1]))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

__all__ = ["drop_empty", "innermost", "main", "save_stacks", "stacks_file", "write_on_signal"]
