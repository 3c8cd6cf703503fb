"""Which rank keeps a launch from going on: a pure judgement of what the ranks last told.

A rank is **silent** when its heartbeat stops: the process is stopped or its host cannot be reached. A launch **hangs**
when a rank beats but does not advance. Ranks wait for each other in every step, so only the one that is behind is
judged; the phase it is in says how long it may take:

- `step`: 20 times the slowest step so far, at least five minutes. A first step may compile: it has the longer time.
- `data`, `start`, `evaluation`, `checkpoint`, `end`: 25 minutes. A loader that waits minutes for its storage is slow,
  not broken. The collective that the other ranks wait in gives up after 30 minutes, without knowing the cause.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from launch.pulse import Beat, Pulses

LONG_SECONDS = 1500.0
_STEP_SECONDS, _STEP_FACTOR = 300.0, 20.0
_SILENT_SECONDS = 60.0  # thirty heartbeats
_SILENT_LONG_SECONDS = 300.0  # a library may keep Python from running for so long while it loads or writes
_ORDER = ("start", "evaluation", "checkpoint", "data", "step", "end")
"""Between two steps the phases follow each other like this."""


@dataclass(frozen=True, slots=True)
class Hang:
    """Ranks that keep the others waiting."""

    ranks: tuple[int, ...]
    phase: str
    step: int
    """Finished steps of these ranks."""
    seconds: float
    """Without a heartbeat, or without an advance."""
    silent: bool
    """They were not heard; otherwise they beat, but do not advance."""
    everybody: bool
    """No rank is ahead of another: all wait, and none of them is known to be the cause."""

    def __str__(self) -> str:
        where = f"`{self.phase}` after step {self.step}"
        if self.silent:
            why = "its process is stopped or gone, or its host is out of reach"
            return f"silent for {self.seconds:.0f} s in {where}: {why}"
        waits = "; all ranks wait, which of them is the cause is not known" if self.everybody else ""
        return f"hangs: for {self.seconds:.0f} s in {where}{waits}"


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a rank may take."""

    hang_seconds: float | None = None
    """For `step` and `data`, once the rank has finished a step; None = as the module says, 0 = for ever."""
    hears_all: bool = True
    """Otherwise a rank in `step` may wait for one that is not heard here, which may wait for its data."""

    def advance(self, beat: Beat, pulses: Pulses) -> float:
        """Seconds that a rank may stay where it is."""
        if beat.phase not in ("step", "data") or not pulses.has_stepped(beat.rank):
            return max(LONG_SECONDS, self.hang_seconds or 0.0)
        if self.hang_seconds is not None:
            return self.hang_seconds
        if beat.phase == "data" or not self.hears_all:
            return LONG_SECONDS
        return min(max(_STEP_SECONDS, _STEP_FACTOR * pulses.slowest_step), LONG_SECONDS)

    def silence(self, beat: Beat) -> float:
        """Seconds that a rank may be silent."""
        given = self.hang_seconds or _SILENT_LONG_SECONDS
        if beat.phase in ("step", "data"):
            return min(_SILENT_SECONDS, given)
        return min(_SILENT_LONG_SECONDS, max(_SILENT_SECONDS, given))


def find_hang(pulses: Pulses, ended: Collection[int], limits: Limits, now: float) -> Hang | None:
    """The ranks that hang, if any does.

    Args:
        pulses: of the ranks; those that were never heard are not judged.
        ended: ranks that reported their end.
        limits: how long they may take.
        now: by the clock of the pulses.
    """
    if limits.hang_seconds == 0:
        return None
    beats = [beat for rank, beat in sorted(pulses.last.items()) if rank not in ended]
    if any(beat.age(now) > limits.silence(beat) for beat in beats):
        # with all whose last words came at about the same time: the ranks of one host fall silent together
        silent = [beat for beat in beats if beat.age(now) > limits.silence(beat) / 2]
        return _hang(silent, max(beat.age(now) for beat in silent), silent=True)
    if not beats:
        return None
    last = min(map(_place, beats))
    behind = [beat for beat in beats if _place(beat) == last]
    stuck = [beat for beat in behind if beat.stuck(now) > limits.advance(beat, pulses)]
    if not stuck:
        return None
    return _hang(behind, max(beat.stuck(now) for beat in stuck), everybody=len(behind) == len(beats) > 1)


def _hang(beats: list[Beat], seconds: float, **what: Any) -> Hang:
    ranks, first = tuple(beat.rank for beat in beats), beats[0]
    return Hang(ranks, first.phase, first.step, seconds, **{"silent": False, "everybody": False, **what})


def _place(beat: Beat) -> tuple[int, int]:
    return beat.step, _ORDER.index(beat.phase) if beat.phase in _ORDER else len(_ORDER)


def resolved(limits: Limits) -> Mapping[str, str]:
    """The limits in words, for the log."""
    if limits.hang_seconds == 0:
        return {"hang": "never looked for (--hang-seconds 0)"}
    given = limits.hang_seconds
    step = f"{given:g} s" if given is not None else f"{_STEP_FACTOR:g} x the slowest, at least {_STEP_SECONDS:g} s"
    data = f"{given if given is not None else LONG_SECONDS:g} s"
    return {"step": step, "data": data, "other phases": f"{max(LONG_SECONDS, given or 0):g} s"}


__all__ = ["LONG_SECONDS", "Hang", "Limits", "find_hang", "resolved"]
