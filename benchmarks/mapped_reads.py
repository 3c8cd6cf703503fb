"""What reading shards in place is worth: pages checked with mincore, pages populated at every read, and copies.

    python benchmarks/mapped_reads.py [--quick] [--out FILE]

The loader without workers over clips of 200 KB (bytes and checksum) and over 120 x 768 float16 features (padded to
batches), sequential and shuffled, everything in the page cache. The three ways take turns in one process, a window
each, so that other load meets all of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import loader_pool
from loader_data import make_clips, make_features
from peers.measure import cpu_seconds
from receipt import Claim, write_receipt

from shards.format.index import read_index
from shards.load.loader import LoaderOptions, StepLoader
from shards.load.reader import Reader
from shards.order.items import Elements
from shards.order.plan import Plan, PlanOptions, Source
from shards.storage.access import LocalFiles
from shards.storage.mapped import MappedFile

TARGET = 1.1


def fetch_sizes(reader: Reader, item: Elements) -> list[int]:
    return [len(reader.payload(sample)) for sample in item["sample"].tolist()]


def collate_sizes(items: list[list[int]]) -> dict[str, Any]:
    return {"sizes": items}


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


@contextmanager
def populated() -> Iterator[None]:
    """Every range is populated at every read."""
    before = MappedFile._resident
    MappedFile._resident = lambda *_: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        MappedFile._resident = before  # type: ignore[method-assign]


@contextmanager
def copied() -> Iterator[None]:
    """As on kernels that cannot populate: every range is read into memory of its own."""
    before = LocalFiles.views

    def views(self: LocalFiles, *ranges: Any) -> Iterator[memoryview]:
        self._can_map = False
        return before(self, *ranges)

    LocalFiles.views = views  # type: ignore[method-assign]
    try:
        yield
    finally:
        LocalFiles.views = before  # type: ignore[method-assign]


WAYS: dict[str, Callable[[], Any]] = {"mincore": as_it_is, "populated": populated, "copied": copied}


def loader(folder: Path, kind: str, shuffle: bool) -> Iterator[Any]:
    plan = Plan([Source(read_index(folder))], PlanOptions("clip", shuffle=shuffle))
    options = LoaderOptions(0, 1, 4, 4)
    if kind == "clips":
        return iter(StepLoader(plan, fetch_sizes, collate_sizes, options))
    return iter(StepLoader(plan, partial(loader_pool.fetch, kind=kind), loader_pool.collate, options))


def measure(folder: Path, kind: str, shuffle: bool, runs: int, window: int) -> dict[str, list[float]]:
    """CPU seconds per micro-batch of every way."""
    loaders, found = {way: loader(folder, kind, shuffle) for way in WAYS}, {way: list[float]() for way in WAYS}
    for run in range(runs + 1):
        for way, how in WAYS.items():
            with how():
                begin = cpu_seconds()
                for _ in islice(loaders[way], window):
                    pass
                if run:  # the first window warms up
                    found[way].append((cpu_seconds() - begin) / window)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer windows")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    options = parser.parse_args()
    runs, rows = 4 if options.quick else 12, []
    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        folders = {"clips": make_clips(Path(scratch) / "clips", 2000)}
        folders["features"] = make_features(Path(scratch) / "features", 2000)
        for kind, folder in folders.items():
            for shuffle in (False, True):
                found = measure(folder, kind, shuffle, runs, window=500)
                rates = {way: 1 / median(seconds) for way, seconds in found.items()}
                for way in ("populated", "copied"):
                    name = f"{kind}, {'shuffled' if shuffle else 'sequential'}: against {way}"
                    numbers = rates["mincore"], rates[way], rates["mincore"] / rates[way]
                    rows.append(Claim(name, *numbers, TARGET, "micro-batches of 4 per CPU-second", runs, detail=found))
    write_receipt(rows, options.out, ["torch", "numpy"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
