"""What this process is doing, and how long it has done each thing: for its heartbeat, hang reports and goodput."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal

Phase = Literal["start", "data", "step", "checkpoint", "evaluation", "end"]
"""`start`: imports, rendezvous, models, resume. `data`: waiting for the loader. `step`: agreement, forward, backward,
update, and what observers do beside them."""


class Phases:
    """The present phase and the seconds spent in each.

    The training thread writes; other threads may read at any time.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spent: dict[str, float] = {}
        self._now: tuple[Phase, float] = ("start", clock())
        self.step = 0
        """Finished steps of the run."""
        self.total_steps = 0
        """Of the whole run; 0 before it is known."""

    @property
    def now(self) -> tuple[Phase, float]:
        """The present phase, and for how many seconds it has lasted."""
        phase, since = self._now
        return phase, self._clock() - since

    def enter(self, phase: Phase) -> None:
        """The phase before ends here."""
        before, since = self._now
        at = self._clock()
        self._spent[before] = self._spent.get(before, 0.0) + at - since
        self._now = (phase, at)

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """The phase lasts as long as the context; then the one before goes on."""
        before = self._now[0]
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """Per phase so far, the present one included."""
        phase, lasted = self.now
        return {**self._spent, phase: self._spent.get(phase, 0.0) + lasted}
