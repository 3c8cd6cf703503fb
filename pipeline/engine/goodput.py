"""Where the time of a run went, over all its attempts. Standard library only: `slt launch status` reads it, too.

``run_dir/goodput.jsonl`` holds a row per attempt, the newest one rewritten as the attempt goes on:

- ``started``, ``updated``: seconds since 1970, when the attempt began and when the row was written;
- ``world_size``; ``phases``: rank 0's seconds per phase (`pipeline.engine.phases`);
- ``first_step``, ``step``: finished steps where the attempt began and now;
- ``steps``: steps it has taken; ``undone_steps``: those that a rollback took back;
- ``repeated_steps``: steps of earlier attempts behind ``first_step``, which are done again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError

NAME = "goodput.jsonl"
PARTS = {
    "step": "steps that count", "start": "start", "data": "data wait", "checkpoint": "checkpoints",
    "evaluation": "evaluation", "end": "end", "lost": "lost work", "down": "downtime",
}  # fmt: skip
"""What the time of a run consists of, and how people are told."""


@dataclass(frozen=True, slots=True)
class Goodput:
    """A run's time since its first start."""

    attempts: int
    seconds: Mapping[str, float]
    """By part, see `PARTS`; they add up to all of it."""

    @property
    def wall_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Part of the time that went into steps that count, 0 to 1."""
        return self.seconds["step"] / self.wall_seconds if self.wall_seconds else 0.0

    def describe(self) -> str:
        """One line; parts under 0.05 % are left out."""
        wall = self.wall_seconds
        shares = {PARTS[part]: 100 * spent / wall for part, spent in self.seconds.items() if wall and part != "step"}
        rest = ", ".join(f"{name} {share:.1f} %" for name, share in shares.items() if share >= 0.05)
        starts = f" and {self.attempts} starts" if self.attempts > 1 else ""
        return f"goodput {100 * self.goodput:.1f} % of {duration(wall)}{starts}" + (f" ({rest})" if rest else "")


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run, oldest first; none for a run that keeps none.

    Raises:
        StorageError: the file cannot be read.
    """
    path = run_dir / NAME
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}; remove it: only this statistic begins anew") from error


def split(rows: Sequence[Mapping[str, Any]]) -> Goodput:
    """The time of all attempts up to the newest row's.

    Lost work is the time of steps that were done again or undone, at the pace of the attempt that took them. Downtime
    begins where an attempt last wrote its row, and so includes the steps that it took after that.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    repeated = 0  # of this and earlier attempts' steps, by later ones
    for row in reversed(rows):
        for phase, spent in row["phases"].items():
            seconds[phase] += spent
        steps, wasted = row["steps"], row["undone_steps"] + repeated
        lost = row["phases"].get("step", 0.0) * min(wasted / steps, 1.0) if steps else 0.0
        seconds["lost"] += lost
        seconds["step"] -= lost
        repeated = max(wasted - steps, 0) + row["repeated_steps"]
    for before, after in pairwise(rows):
        seconds["down"] += max(after["started"] - before["updated"], 0.0)
    return Goodput(len(rows), seconds)


def duration(seconds: float) -> str:
    """In words: 42 s, 3 min, 2.5 h."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{hours:.1f} h"
