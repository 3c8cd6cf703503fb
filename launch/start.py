"""The first code of the `slt` command: handles signals that arrive during its slow imports."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

from pipeline.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, stop_signals

_RUNS = (("launch", "run"), ("train",))
"""Commands that train; they install their own signal handlers, which report how the run stopped."""


def main() -> None:
    """Entry point of `slt`."""
    if any(tuple(sys.argv[1 : 1 + len(words)]) == words for words in _RUNS):
        for number in stop_signals():
            signal.signal(number, _leave)
    from launch.slt import main as run

    run()


def _leave(number: int, frame: FrameType | None) -> None:
    del frame
    with contextlib.suppress(OSError):  # the terminal may be gone
        sys.stderr.write(f"{signal.Signals(number).name}: stopped before the first step, nothing to save\n")
        sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED)
