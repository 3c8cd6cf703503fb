"""What the ranks of a launch last told of themselves, and which of them hang: pure, without clocks of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_RATE_STEPS = 50  # the speed shown is that of so many last changes of the step


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat of a rank."""

    rank: int
    host: str
    """The rank's own name of its host."""
    pid: int
    phase: str
    seconds: float
    """For which the phase had lasted."""
    step: int
    """Finished steps."""
    total_steps: int
    heard: float
    """When it arrived, by the launcher's clock."""

    @classmethod
    def read(cls, report: Mapping[str, Any], heard: float) -> Beat:
        """Raises KeyError, TypeError or ValueError for anything but a heartbeat."""
        beat = report["beat"]
        numbers = (int(beat["step"]), int(beat["total_steps"]))
        return cls(
            int(report["rank"]), str(beat["host"]), int(beat["pid"]), str(beat["phase"]), float(beat["seconds"]),
            *numbers, heard,
        )  # fmt: skip

    def age(self, now: float) -> float:
        """Seconds without a sign of life."""
        return max(now - self.heard, 0.0)

    def stuck(self, now: float) -> float:
        """Seconds in the same phase of the same step, as far as is known."""
        return self.seconds + self.age(now)


class Pulses:
    """The last heartbeat of every rank. The thread that reads the output writes; others read copies."""

    def __init__(self) -> None:
        self._last: dict[int, Beat] = {}
        self._changes: tuple[tuple[float, int], ...] = ()
        self._first_step: dict[int, int] = {}
        self.slowest_step = 0.0
        """Seconds of the longest finished `step` phase that was heard of."""

    def take(self, beat: Beat) -> None:
        before = self._last.get(beat.rank)
        self._first_step.setdefault(beat.rank, beat.step)
        if before is not None and before.phase == "step" and _moved(before, beat):
            self.slowest_step = max(self.slowest_step, before.seconds)
        self._last = {**self._last, beat.rank: beat}
        if not self._changes or beat.step > self._changes[-1][1]:
            self._changes = (*self._changes[-_RATE_STEPS:], (beat.heard, beat.step))

    def forgive(self, seconds: float) -> None:
        """The launcher itself did not run for that long: nobody could be heard."""
        self._last = {
            rank: Beat(b.rank, b.host, b.pid, b.phase, b.seconds, b.step, b.total_steps, b.heard + seconds)
            for rank, b in self._last.items()
        }

    @property
    def last(self) -> Mapping[int, Beat]:
        return self._last

    @property
    def step(self) -> int:
        """Finished steps of the rank that is ahead."""
        return max((beat.step for beat in self._last.values()), default=0)

    @property
    def total_steps(self) -> int:
        """0 before it is known."""
        return max((beat.total_steps for beat in self._last.values()), default=0)

    def has_stepped(self, rank: int) -> bool:
        """Whether this rank has finished a step in this attempt: its first may compile for minutes."""
        return rank in self._last and self._last[rank].step > self._first_step[rank]

    def steps_per_second(self) -> float | None:
        """None before two steps were heard of."""
        changes = self._changes
        if len(changes) < 3:
            return None
        # the first is where the attempt began, the start included
        (begin, first), (end, last) = changes[1], changes[-1]
        return (last - first) / (end - begin) if end > begin else None


def _moved(before: Beat, after: Beat) -> bool:
    return (before.phase, before.step) != (after.phase, after.step) or after.seconds < before.seconds


__all__ = ["Beat", "Pulses"]
