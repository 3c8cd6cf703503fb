"""How many samples every source gives to every epoch, and to every chunk of it: exact integers, no data.

A source is an endless stream of passes (:class:`shards.order.shuffle.Stream`). Epoch ``e`` takes the next ``quota(e)``
positions of it, so at any moment of a run the samples of a source have been shown equally often, give or take one,
whatever its weights were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TypeAlias

Schedule: TypeAlias = tuple[tuple[int, float], ...]
Weight: TypeAlias = float | Sequence[Sequence[float]]
"""A number, or a schedule of ``(epoch, weight)`` points: linear between them, constant before and after."""


def as_schedule(weight: Weight) -> Schedule:
    """A weight as points; a number is one point.

    Raises ValueError that says what is wrong with it.
    """
    if isinstance(weight, int | float):
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"must be positive, it is {weight}")
        return ((0, float(weight)),)
    points = [tuple(point) for point in weight]
    if not points or any(len(point) != 2 for point in points):
        raise ValueError(f"must be a number or a list of (epoch, weight) points, it is {weight!r}")
    epochs, weights = [point[0] for point in points], [point[1] for point in points]
    if any(epoch != int(epoch) or epoch < 0 for epoch in epochs) or sorted(set(epochs)) != epochs:
        raise ValueError(f"needs whole epochs in ascending order in its schedule, they are {epochs}")
    if not all(math.isfinite(value) and value >= 0 for value in weights) or not any(weights):
        raise ValueError(f"needs weights of at least 0, and one above, in its schedule, they are {weights}")
    return tuple((int(epoch), float(value)) for epoch, value in points)


def weight_at(schedule: Schedule, epoch: int) -> float:
    """The weight of an epoch: linear between the points of the schedule, constant before and after."""
    after = next((number for number, point in enumerate(schedule) if point[0] > epoch), len(schedule))
    if after in (0, len(schedule)):
        return schedule[max(after - 1, 0)][1]
    (begin, first), (end, last) = schedule[after - 1], schedule[after]
    return first + (last - first) * ((epoch - begin) / (end - begin))


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` divided in proportion to the weights: largest remainders, at least one for every positive weight.

    Exact for any floats; equal remainders go to the earlier source. ``total`` must be at least the number of positive
    weights.
    """
    exact = [Fraction(weight) for weight in weights]
    shares = [total * weight / sum(exact) for weight in exact]
    parts = [max(int(share), 1) if share else 0 for share in shares]
    numbers = range(len(parts))
    while (missing := total - sum(parts)) != 0:
        if missing > 0:
            number = max(numbers, key=lambda n: (shares[n] - parts[n], -n))
        else:  # the ones that were raised to one sample cost the most generous share
            number = max((n for n in numbers if parts[n] > 1), key=lambda n: (parts[n] - shares[n], -n))
        parts[number] += 1 if missing > 0 else -1
    return parts


class Mixture:
    """What every source gives to an epoch.

    Args:
        counts: samples of each source.
        schedules: weight of each source.
        epoch_samples: 0 = a weight is a number of passes per epoch, ``round(weight x count)`` samples and at least one;
            otherwise every epoch has exactly so many samples and weights are proportions of it.
    """

    def __init__(self, counts: Sequence[int], schedules: Sequence[Schedule], epoch_samples: int = 0) -> None:
        self.counts, self.schedules, self.epoch_samples = tuple(counts), tuple(schedules), epoch_samples
        self.settled = max(schedule[-1][0] for schedule in schedules)
        """From this epoch on nothing changes any more."""
        self._begins: list[tuple[int, ...]] = [(0,) * len(self.counts)]
        self._quotas = lru_cache(maxsize=64)(self._make_quotas)

    def problem(self) -> str:
        """What makes an epoch of this mixture impossible; empty when nothing does."""
        for epoch in sorted({0, *(point[0] for schedule in self.schedules for point in schedule)}):
            shown = sum(weight_at(schedule, epoch) > 0 for schedule in self.schedules)
            if not shown:  # weights are linear between points: an epoch of none implies a point of none
                return f"all weights are 0 in epoch {epoch}"
        most = len(self.schedules)
        if 0 < self.epoch_samples < most:
            return f"epoch_samples={self.epoch_samples} is less than one sample for each of {most} sources"
        return ""

    def quotas(self, epoch: int) -> tuple[int, ...]:
        """Samples every source gives to an epoch."""
        return self._quotas(min(epoch, self.settled))

    def begins(self, epoch: int) -> tuple[int, ...]:
        """Position of every source's stream at which an epoch begins: all it gave to the epochs before."""
        rest = max(epoch - self.settled, 0)
        begins = self._begins
        if len(begins) <= epoch - rest:
            begins = list(begins)  # another thread may do the same: neither sees the other's half
            while len(begins) <= epoch - rest:
                begins.append(tuple(map(sum, zip(begins[-1], self.quotas(len(begins) - 1), strict=True))))
            self._begins = begins
        return tuple(b + rest * q for b, q in zip(begins[epoch - rest], self.quotas(epoch), strict=True))

    def _make_quotas(self, epoch: int) -> tuple[int, ...]:
        weights = [weight_at(schedule, epoch) for schedule in self.schedules]
        if self.epoch_samples:
            return tuple(apportion(self.epoch_samples, weights))
        return tuple(
            max(math.floor(weight * count + 0.5), 1) if weight else 0
            for weight, count in zip(weights, self.counts, strict=True)
        )


def chunk_range(quota: int, chunk: int, chunks: int) -> tuple[int, int]:
    """Which of a source's samples of an epoch lie in a chunk.

    Sample ``j`` of ``quota`` stands at the fraction ``(j + 1/2) / quota`` of the epoch, chunk ``c`` covers
    ``[c / chunks, (c + 1) / chunks)``.
    """
    begin, end = (-(-(2 * quota * number - chunks) // (2 * chunks)) for number in (chunk, chunk + 1))
    return begin, end
