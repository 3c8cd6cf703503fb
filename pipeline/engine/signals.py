"""SIGTERM, SIGUSR1 and Ctrl-C (SIGINT) ask for a save at the next step boundary.

The handler only sets a flag: DeepSpeed's launcher signals ranks one at a time, so ranks must first agree (the
trainer's all-reduce) before anything collective happens.
"""

from __future__ import annotations

import signal
from types import FrameType


class StopFlag:
    """True once this process was asked to stop; install in the main thread, restore when done."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self.interrupted = False
        """The request was a Ctrl-C."""
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopFlag:
        self._previous = {number: signal.signal(number, self._set) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _set(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the save
        self.requested = True
        # a launcher answers Ctrl-C with SIGTERM to its ranks: that does not undo it
        self.interrupted = self.interrupted or number == signal.SIGINT
