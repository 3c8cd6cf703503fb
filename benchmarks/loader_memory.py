"""Memory and open files of the loader over many batches: both must stay flat.

    python benchmarks/loader_memory.py [--quick] [--out FILE]

Small documents in packs, without workers and with two; the memory that belongs to the process and its workers alone
(USS) is sampled a hundred times after ten seconds of warm-up, and a line is fitted. A leak of one object per batch
shows as bytes per batch; the receipt's target is less than 16 of them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from loader_data import make_documents
from receipt import Claim, write_receipt

from shards.format.index import read_index
from shards.load.loader import LoaderOptions, StepLoader
from shards.load.reader import Reader
from shards.order.items import Elements
from shards.order.plan import Plan, PlanOptions, Source

SAMPLES_OF_MEMORY, WARM_SECONDS, TARGET_BYTES_PER_BATCH = 100, 10.0, 16.0


def fetch(reader: Reader, item: Elements) -> list[np.ndarray]:
    return list(reader.documents(item))


def collate(items: list[list[np.ndarray]]) -> dict[str, Any]:
    return {"tokens": sum(len(document) for documents in items for document in documents)}


def usage() -> tuple[int, int]:
    """Bytes of their own and open files of this process and its workers."""
    me, used, opened = psutil.Process(), 0, 0
    for one in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper that ended meanwhile
            used += one.memory_full_info().uss
            opened += one.num_fds()
    return used, opened


def measure(folder: Path, workers: int, batches: int) -> tuple[float, int, list[int]]:
    """Bytes per batch by a fitted line, the change of the number of open files, and the memory samples."""
    plan = Plan([Source(read_index(folder))], PlanOptions("pack", block_tokens=256))
    steps = iter(StepLoader(plan, fetch, collate, LoaderOptions(0, 1, 4, 4, workers)))
    begin = time.monotonic()
    while time.monotonic() - begin < WARM_SECONDS:
        next(steps)
    every = batches // SAMPLES_OF_MEMORY
    memory: list[int] = []
    files: list[int] = []
    for number in range(batches):
        next(steps)
        if number % every == 0:
            used, opened = usage()
            memory.append(used)
            files.append(opened)
    slope = float(np.polyfit(np.arange(len(memory)) * every, memory, 1)[0])
    return slope, max(files) - min(files), memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 000 batches instead of 40 000")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    options = parser.parse_args()
    batches = 4000 if options.quick else 40_000
    rows = []
    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        folder = make_documents(Path(scratch) / "documents", 20_000)
        for workers in (0, 2):
            slope, files, memory = measure(folder, workers, batches)
            name = f"over {batches:,} batches, {workers} workers"
            detail = {"uss_bytes": memory[:: len(memory) // 10]}
            rows += [
                Claim(f"growth {name}", slope, None, None, TARGET_BYTES_PER_BATCH, "bytes per batch", 1, False, detail),
                Claim(f"open files {name}", files, None, None, 0, "most minus fewest", 1, False),
            ]
    write_receipt(rows, options.out, ["torch", "numpy", "psutil"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
