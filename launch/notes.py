"""Reports from a rank to its launcher: one line each on the output that the launcher reads anyway.

A run directory that is full or gone cannot take an exit note; these lines need no disk. A line is at most as long as
`srun` carries in one piece (an atomic write to a pipe may be longer), so that lines of several ranks do not mix.

A rank imports this before it can honour a signal: nothing heavy here.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
from typing import Any

from pipeline.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

log = logging.getLogger(__name__)

LAUNCH_ID = "SLT_LAUNCH_ID"
"""Environment variable of every process of one launch, on every host; finds its ranks."""
BEFORE_FIRST_STEP = "before the first step, nothing to save"
_MARK = "slt-rank-report: "
_LINE = re.compile(_MARK + r"(\{.*\})\s*$")
_STDERR = 2
_MAX_BYTES = 1024


def tell(report: dict[str, Any]) -> bool:
    """Send a report to the launcher; False if none started this process, or it listens no longer. A long ``error`` is
    cut in the middle."""
    if LAUNCH_ID not in os.environ:
        return False
    error = str(report.get("error", ""))
    kept = len(error)
    while len(line := _as_line(report)) > _MAX_BYTES:
        kept = kept * 3 // 4
        report = {**report, "error": f"{error[: kept // 2]} [...] {error[len(error) - kept // 2 :]}"}
    return _write(line)


def read(line: str) -> tuple[str, dict[str, Any] | None]:
    """A line of output -> the text to show, and the report in it."""
    match = _LINE.search(line)
    if match is None:
        return line, None
    try:
        report = json.loads(match[1])
    except ValueError as problem:
        log.warning("a rank's report cannot be read (%s): %s", problem, line)
        return line, None
    return line[: match.start()], report


def leave_before_first_step(number: int) -> None:
    """End this rank at once: it was asked to stop and has nothing to save."""
    rank, code = this_rank(), EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
    tell({"rank": rank, "code": code, "error": "", "stopped": BEFORE_FIRST_STEP})
    if rank == 0:
        _write(f"{signal.Signals(number).name}: stopped {BEFORE_FIRST_STEP}\n".encode())
    os._exit(code)  # a clean exit would wait for the main thread


def tell_begun() -> None:
    """Report that training begins: a rank that ends without a report now loses work. Rank 0 reports for all."""
    if this_rank() == 0:
        tell({"rank": 0, "begun": True})


def this_rank() -> int:
    """This process's rank; 0 if no launcher has set it."""
    return int(os.environ.get("RANK", "0"))


def _write(line: bytes) -> bool:
    """Write in one call, and not to sys.stderr, which is redirected while a noisy library is silenced. False if nobody
    reads it."""
    try:
        os.write(_STDERR, line)
    except OSError as problem:  # the launcher is gone
        log.debug("nobody reads %r: %s", line, problem)
        return False
    return True


def _as_line(report: dict[str, Any]) -> bytes:
    return f"{_MARK}{json.dumps(report)}\n".encode()


__all__ = ["BEFORE_FIRST_STEP", "LAUNCH_ID", "leave_before_first_step", "read", "tell", "tell_begun", "this_rank"]
