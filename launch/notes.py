"""What a rank tells its launcher besides its log: one line each on the output that the launcher reads anyway.

A run directory that is full or gone cannot take an exit note; this way needs no disk. A line is at most as long as a
pipe takes in one piece, so that ranks which write at once do not mix.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
from typing import Any

from launch.plan import LAUNCH_ID
from pipeline.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

log = logging.getLogger(__name__)

BEFORE_FIRST_STEP = "before the first step, nothing to save"
_MARK = "slt-rank-report: "
_LINE = re.compile(_MARK + r"(\{.*\})\s*$")
_MAX_BYTES = 4096  # PIPE_BUF of Linux


def tell(report: dict[str, Any]) -> None:
    """Send a report to the launcher, if one started this process. A long ``error`` loses its middle."""
    if LAUNCH_ID not in os.environ:
        return
    error = str(report.get("error", ""))
    kept = len(error)
    while len(line := _as_line(report)) > _MAX_BYTES:
        kept = kept * 3 // 4
        report = {**report, "error": f"{error[: kept // 2]} [...] {error[len(error) - kept // 2 :]}"}
    sys.stderr.flush()
    try:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line)
    except OSError as problem:  # the launcher is gone
        log.debug("nobody reads reports: %s", problem)


def read(line: str) -> tuple[str, dict[str, Any] | None]:
    """A line of output -> what people should see of it, and the report it holds."""
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
        sys.stderr.write(f"{signal.Signals(number).name}: stopped {BEFORE_FIRST_STEP}\n")
        sys.stderr.flush()
    os._exit(code)  # a clean end would wait for what the main thread is in


def tell_begun() -> None:
    """From now on a rank that ends without a report has lost work. All ranks begin together: one tells."""
    if this_rank() == 0:
        tell({"rank": 0, "begun": True})


def this_rank() -> int:
    """This process's rank; 0 where no launcher has set it."""
    return int(os.environ.get("RANK", "0"))


def _as_line(report: dict[str, Any]) -> bytes:
    return f"{_MARK}{json.dumps(report)}\n".encode()


__all__ = ["BEFORE_FIRST_STEP", "leave_before_first_step", "read", "tell", "tell_begun", "this_rank"]
