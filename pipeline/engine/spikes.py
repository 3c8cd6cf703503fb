"""What is far above its running mean."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Spikes:
    """Finds numbers more than ``factor`` times the running mean of those before.

    The mean is plain over the first ``window`` steps, in which nothing is a spike, and then forgets older steps
    exponentially. A spike enters it as the limit that it broke: one does not hide the next, and a lasting change of
    level ends by itself.

    Args:
        factor: 0 = nothing is a spike.
        window: steps.
        seen: the mean and the steps in it so far; changed in place, so that whoever saves it saves all there is.
    """

    factor: float
    window: int
    seen: list[float]

    @property
    def mean(self) -> float:
        return self.seen[0]

    @property
    def limit(self) -> float:
        """The next number above it is a spike; infinite while too few steps have been seen."""
        mean, steps = self.seen
        return self.factor * mean if self.factor and steps >= self.window else math.inf

    def found(self, value: float, steps: int = 1) -> bool:
        """Take the mean of the next ``steps`` steps; whether it is a spike. Numbers that are not finite are neither
        spikes nor part of the mean."""
        if not math.isfinite(value):
            return False
        spike, value = value > self.limit, min(value, self.limit)
        self.seen[1] += steps
        self.seen[0] += (value - self.seen[0]) * min(1.0, steps / min(self.seen[1], self.window))
        return spike
