"""What a run reads instead of a damaged sample: a rule every rank and worker evaluates alike, without talking.

The substitute is the first readable sample that fits among the items that follow the step. It depends on the plan and
on the bytes only, so any world size and worker count replaces the same sample by the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.errors import DataError
from shards.load.reader import SampleReader
from shards.order.items import SHOWN_ELEMENT, Elements, Items
from shards.order.plan import Cursor, Plan
from shards.storage.store import StoreError

Fetch = Callable[[SampleReader, Elements], list[Any]]
"""``fetch(reader, item)``: one raw sample per element of the item, in order. Raises DataError for a damaged one.

Where the fetch has an attribute ``draws`` that is true, training gives it SHOWN_ELEMENTs, for :mod:`shards.load.draws`.
"""

SEARCHED_ITEMS = 256


@dataclass(frozen=True, slots=True)
class BadSample:
    """A damaged sample and what was read in its place."""

    sample: int
    shard: str
    key: str
    reason: str
    substitute: int
    """Sample number; -1 when the item went on without it because nothing small enough was found."""

    def __str__(self) -> str:
        return f"{self.shard}:{self.key}: {self.reason.splitlines()[0]} (read sample {self.substitute} instead)"


def fetch_item(
    reader: SampleReader, fetch: Fetch, item: Elements, after: Callable[[], Cursor]
) -> tuple[list[Any], list[BadSample]]:
    """The raw samples of an item, damaged ones replaced.

    Args:
        reader: reads the plan's samples.
        fetch: makes raw samples of elements.
        item: the elements wanted.
        after: where the search for substitutes begins; beyond the step, so that none is in the step already. Asked
            only when there is a damaged sample.

    Raises:
        StoreError: the storage does not answer; what cannot be read now is no damaged sample.
        DataError: nothing readable can take the place of the only sample of an item.
    """
    try:
        return list(fetch(reader, item)), []
    except StoreError:
        raise
    except DataError:
        pass  # which sample it was is found below, one by one
    raws: list[Any] = []
    bad: list[BadSample] = []
    used = {int(sample) for sample in item["sample"]}
    for number in range(len(item)):
        element = item[number : number + 1]
        try:
            raws += fetch(reader, element)
        except StoreError:
            raise
        except DataError as problem:
            sample = int(element["sample"][0])
            shown = item.dtype == SHOWN_ELEMENT
            following, _ = reader.plan.items(after(), SEARCHED_ITEMS, shown)
            samples, substitute = _substitute(reader, fetch, _room(reader.plan, item, number), following, used)
            raws += samples
            used.add(substitute)
            row = reader.plan.samples.row(sample)
            bad.append(BadSample(sample, row.shard, row.key, problem.what, substitute))
    if not raws:
        raise DataError(
            f"{bad[0].reason}; and none of the next {SEARCHED_ITEMS} items holds a readable sample in its place",
            where=reader.where(bad[0].sample),
            fix="run `slt shards lint DIR`: the shards are damaged beyond single samples, or an option does not fit "
            "the data",
        )
    return raws, bad


def _room(plan: Plan, item: Elements, number: int) -> int:
    """Tokens or frames a substitute may have so that the item stays within its budget."""
    lengths = item["length"].astype(np.int64)
    if plan.options.kind in ("pack", "sequence"):
        return int(lengths[number] + plan.options.block_tokens - lengths.sum())
    if plan.options.kind == "group":
        return int(max(lengths.max(), (plan.options.frame_budget or 0) // len(item)))
    return int(np.iinfo(np.int64).max)


def _substitute(
    reader: SampleReader, fetch: Fetch, room: int, following: Items, used: set[int]
) -> tuple[list[Any], int]:
    for item in following:
        for number in range(len(item)):
            sample, _, length, *_ = item[number].item()
            if length > room or sample in used:
                continue
            try:
                return list(fetch(reader, item[number : number + 1])), sample
            except StoreError:
                raise
            except DataError:
                used.add(sample)  # will be reported when its own turn comes
    return [], -1
