"""One thing that takes memory, and when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GIB = 1024**3
START, ENCODING, BACKWARD, STEP = "start", "frozen encoder", "backward", "optimizer step"
GENERATION = "generation"
TRAINING = frozenset({ENCODING, BACKWARD, STEP})
PHASES = (START, ENCODING, BACKWARD, STEP, GENERATION)
"""What a rank does one after the other: memory of one phase is free again in the next."""
ALWAYS = frozenset(PHASES)


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes on one device."""

    item: str
    bytes: int
    rule: str
    """How they were computed, in words."""
    phases: frozenset[str] = ALWAYS
    """When they are there together."""
    fields: tuple[str, ...] = ()
    """Recipe settings that change them."""


def peak(lines: Iterable[Line]) -> tuple[str, int]:
    """The phase that needs most, and its bytes."""
    kept = list(lines)
    sums = {phase: sum(line.bytes for line in kept if phase in line.phases) for phase in PHASES}
    phase = max(PHASES, key=lambda name: sums[name])
    return phase, sums[phase]


__all__ = ["ALWAYS", "BACKWARD", "ENCODING", "GENERATION", "GIB", "PHASES", "START", "STEP", "TRAINING", "Line", "peak"]
