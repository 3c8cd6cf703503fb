"""SIGTERM and SIGUSR1 ask for a save at the next step boundary.

The handler only sets a flag: DeepSpeed's launcher signals ranks one at a time, so ranks must first agree (the
trainer's all-reduce) before anything collective happens.
"""

from __future__ import annotations

import signal
from types import FrameType


class StopFlag:
    """True once this process was asked to stop; install in the main thread, restore when done."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopFlag:
        self._previous = {number: signal.signal(number, self._set) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _set(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
