"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C (SIGINT) are honoured from a rank's first moment to its last.

Before the first step there is nothing to save, and the main thread may sit for minutes in a library that does not
return to Python (a rendezvous, a load): a separate thread ends the process at once. From the first step on the
handler only sets a flag: DeepSpeed's launcher signals ranks one at a time, so ranks must first agree (the trainer's
all-reduce) before anything collective happens, and then save. Under nohup SIGHUP stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from pipeline.errors import stop_signals


class StopFlag:
    """True once this process was asked to stop; install in the main thread, restore when done.

    Args:
        leave: called in a thread with the number of a signal that comes before `begin`; must end the process.
            None = only set the flag then, too.
        begun: called once by `begin`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __init__(self, leave: Callable[[int], None] | None = None, begun: Callable[[], None] | None = None) -> None:
        self.requested = False
        self.interrupted = False
        """The request was a Ctrl-C."""
        self._leave, self._on_begin = leave, begun
        self._begun, self._lock = False, threading.Lock()
        self._previous: dict[signal.Signals, object] = {}
        self._wakeup = (-1, -1)

    def begin(self) -> None:
        """Call before the first step: from here a request waits for the save. May be called again."""
        with self._lock:
            first, self._begun = not self._begun, True
        if first and self._on_begin is not None:
            self._on_begin()

    def __enter__(self) -> StopFlag:
        if self._leave is not None:
            # written by the signal's C handler itself, also while the main thread is inside a library
            source, sink = os.pipe()
            os.set_blocking(sink, False)
            self._wakeup = (sink, signal.set_wakeup_fd(sink, warn_on_full_buffer=False))
            threading.Thread(target=self._watch, args=(source, self._leave), name="stop", daemon=True).start()
        self._previous = {number: signal.signal(number, self._set) for number in stop_signals()}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._leave is not None:
            sink, before = self._wakeup
            signal.set_wakeup_fd(before)
            os.close(sink)

    def _watch(self, source: int, leave: Callable[[int], None]) -> None:
        with os.fdopen(source, "rb", buffering=0) as signals:
            while number := signals.read(1):
                with self._lock:
                    if not self._begun and number[0] in self.SIGNALS:
                        leave(number[0])

    def _set(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the save
        self.requested = True
        # a launcher answers Ctrl-C with SIGTERM to its ranks: that does not undo it
        self.interrupted = self.interrupted or number == signal.SIGINT
