"""Stop requests that arrive while no rank of a launch runs: before it has started any, or between two attempts."""

from __future__ import annotations

import signal
from types import FrameType

from launch.notes import BEFORE_FIRST_STEP
from pipeline.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, SltError, stop_signals


class StoppedBeforeStart(SltError):
    """A stop request arrived while recipe, hosts and run directory were checked."""

    def __init__(self, number: int, work: str = BEFORE_FIRST_STEP) -> None:
        interrupted = number == signal.SIGINT
        verb = "interrupted" if interrupted else "stopped"
        super().__init__(f"launch {verb} by {signal.Signals(number).name} {work}")
        self.exit_code = EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED


class StopBeforeStart:
    """Context manager: a signal raises StoppedBeforeStart until ``over`` is set."""

    def __init__(self) -> None:
        self.over = False
        """True after an attempt has run: a signal no longer changes its outcome."""
        self.late: int | None = None
        """A signal that came then."""
        self.work = BEFORE_FIRST_STEP
        """What becomes of the work when a signal comes now."""
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopBeforeStart:
        self._previous = {number: signal.signal(number, self._stop) for number in stop_signals()}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.over:
            raise StoppedBeforeStart(number, self.work)
        self.late = number


__all__ = ["StopBeforeStart", "StoppedBeforeStart"]
