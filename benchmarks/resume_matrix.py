"""Lost and repeated samples over interruptions: every world size, any workers, changed batches, killed processes.

    python benchmarks/resume_matrix.py [--quick] [--out FILE]

A run over a set of uneven shards is stopped and continued at every pair of world sizes {1, 2, 3, 4, 8, 16, 64}, with
0, 1, 2 and 4 workers, with another global batch each time; some of the runs are processes that are ended by SIGKILL in
the middle of a step. Counted over the finished epochs: samples nobody read, samples read twice, global batches that
differ between world sizes, and ranks whose number of micro-batches differs from the others'.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from itertools import islice, product
from pathlib import Path
from typing import Any

from loader_data import make_documents
from receipt import ROOT, Claim, write_receipt

from shards.format.index import read_index
from shards.load.loader import LoaderOptions, StepLoader
from shards.load.reader import Reader
from shards.order.items import Elements
from shards.order.plan import Cursor, Plan, PlanOptions, Source

WORLDS, WORKERS = (1, 2, 3, 4, 8, 16, 64), (0, 1, 2, 4)
Item = list[tuple[int, int]]
"""(sample, tokens) of each document of a pack."""


def fetch(reader: Reader, item: Elements) -> Item:
    tokens = reader.documents(item)
    return [(int(sample), len(ids)) for sample, ids in zip(item["sample"], tokens, strict=True)]


def collate(items: list[Item]) -> dict[str, Any]:
    return {"items": items}


def open_plan(folder: Path) -> Plan:
    return Plan([Source(read_index(folder))], PlanOptions("pack", block_tokens=256, seed=11))


def steps(
    plan: Plan, world: int, workers: int, batch: int, state: dict[str, Any], count: int
) -> tuple[list[list[Item]], int]:
    """Global batches in plan order, and how many ranks had another number of micro-batches than rank 0.

    In a large world only rank 0 gets worker processes: they would be hundreds.
    """
    ranks = []
    for rank in range(world):
        options = LoaderOptions(rank, world, batch, 1, workers if not rank else 0)
        loader = StepLoader(plan, fetch, collate, options)
        loader.load_state_dict(json.loads(json.dumps(state)))
        ranks.append(list(islice(loader, count)))
    shape = [len(step.micro_batches) for step in ranks[0]]
    unequal = sum([len(step.micro_batches) for step in part] != shape for part in ranks)
    slots = batch // world
    return [
        [part[number].micro_batches[slot]["items"][0] for slot in range(slots) for part in ranks]
        for number in range(count)
    ], unequal


def killed(folder: Path, batch: int, workers: int, state: dict[str, Any], count: int) -> list[list[Item]]:
    """The steps a reading process finished before SIGKILL ended it."""
    command = [sys.executable, str(Path(__file__)), "--reader", str(folder), str(batch), str(workers)]
    process = subprocess.Popen([*command, json.dumps(state)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    found = [json.loads(process.stdout.readline()) for _ in range(count)]
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    return [[[(sample, length) for sample, length in item] for item in step] for step in found]


def reader(folder: Path, batch: int, workers: int, state: dict[str, Any]) -> None:
    """Reads and prints steps until it is killed."""
    loader = StepLoader(open_plan(folder), fetch, collate, LoaderOptions(0, 1, batch, 1, workers))
    loader.load_state_dict(state)
    for step in loader:
        print(json.dumps([item for micro in step.micro_batches for item in micro["items"]]), flush=True)


def walk(folder: Path, pairs: list[tuple[int, int]]) -> tuple[list[Item], int, int]:
    """All items read over all interruptions, the interruptions, and the ranks with unequal counts."""
    plan, unequal, stops = open_plan(folder), 0, 0
    got: list[Item] = []
    for number, pair in enumerate(pairs):
        for world in pair:
            state = plan.state(plan.advance(Cursor(), len(got)))
            batch = world * (1 + number % 3)
            found, differing = steps(plan, world, WORKERS[number % 4], batch, state, 2)
            got += [item for step in found for item in step]
            unequal, stops = unequal + differing, stops + 1
        if number % 8 == 0:
            state = plan.state(plan.advance(Cursor(), len(got)))
            got += [item for step in killed(folder, 24, number // 8 % 3, state, 3) for item in step]
            stops += 1
    return got, stops, unequal


def count(plan: Plan, got: list[Item]) -> tuple[int, int, int]:
    """Finished epochs, samples lost and samples repeated in them."""
    begin = epoch = lost = repeated = 0
    while begin + len(plan.epoch(epoch)) <= len(got):
        size = len(plan.epoch(epoch))
        seen = Counter(sample for item in got[begin : begin + size] for sample, _ in item)
        lost += len(plan.samples) - len(seen)
        repeated += sum(times - 1 for times in seen.values())
        begin, epoch = begin + size, epoch + 1
    return epoch, lost, repeated


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="nine pairs of worlds instead of 49")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    parser.add_argument("--reader", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        folder, batch, workers, state = options.reader
        reader(Path(folder), int(batch), int(workers), json.loads(state))
    warnings.filterwarnings("ignore", "This DataLoader will create")
    worlds = (1, 3, 8) if options.quick else WORLDS
    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        folder = make_documents(Path(scratch) / "documents", 800 if options.quick else 5000)
        plan = open_plan(folder)
        got, stops, unequal = walk(folder, list(product(worlds, worlds)))
        epochs, lost, repeated = count(plan, got)
        expected = plan.items(Cursor(), len(got))[0]
        moved = sum(mine != [(s, n) for s, _, n in item.tolist()] for mine, item in zip(got, expected, strict=True))
        state = plan.state(Cursor())
        batches = [steps(plan, world, 0, 192, state, 2)[0] for world in worlds]
        differing = sum(found != batches[0] for found in batches)
    detail = {"interruptions": stops, "items": len(got), "epochs": epochs, "state_bytes": len(json.dumps(state))}
    values = {
        "samples lost": lost, "samples repeated": repeated, "items out of their place in the plan": moved,
        "world sizes with other global batches": differing, "ranks with another number of micro-batches": unequal,
    }  # fmt: skip
    rows = [
        Claim(f"{name}, {stops} interruptions", n, None, None, 0, "", 1, False, detail) for name, n in values.items()
    ]
    rows.append(Claim("finished epochs counted", epochs, None, None, 1, "epochs", 1))
    write_receipt(rows, options.out, ["torch", "numpy"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
