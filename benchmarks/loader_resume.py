"""Seconds to the first batch when a run goes on at 90 % of an epoch, and the bytes of the state that takes.

    python benchmarks/loader_resume.py [--quick] [--out FILE]

Ours computes where the run stopped; it must take the same time at 10 000 and 100 000 samples, and less than 0.2 s from
opening the index to the batch. The peers do what they offer: energon, mosaicml-streaming and litdata restore a state
(their own loaders, no workers), webdataset has none and reads what was seen once more. Imports are not counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from loader_data import make_blocks
from peers.environment import PEERS, Absent, ask
from receipt import Claim, write_receipt

BATCH, PART = 32, 0.9
TARGET_SECONDS, TARGET_BYTES, TARGET_GROWTH = 0.2, 1024, 2.0


def measure(side: str, source: Path, scratch: Path, samples: int, runs: int) -> dict[str, Any] | Absent:
    """The best of some runs, each in a process of its own."""
    out = scratch / side
    consumed = int(samples * PART) // BATCH * BATCH
    try:
        ask(side, "prepare", {"source": str(source), "out": str(out), "kind": "blocks"})
        found = [
            ask(side, "resume", {"folder": str(out), "consumed": consumed, "batch": BATCH}, 200) for _ in range(runs)
        ]
    except Absent as reason:
        return reason
    best: dict[str, Any] = min(found, key=lambda one: one["seconds"])
    return {**best, "all": [one["seconds"] for one in found]}


def claims(samples: int, found: dict[str, dict[str, Any] | Absent], runs: int) -> list[Claim]:
    """First batch and state size, ours against a limit and against every peer."""
    ours = found["ours"]
    if isinstance(ours, Absent):
        raise SystemExit(f"our own side failed: {ours}")
    name, seconds, size = f"{samples:,} samples", ours["seconds"], ours["state_bytes"]
    rows = [
        Claim(f"first batch, {name}", seconds, None, None, TARGET_SECONDS, "seconds", runs, False, ours),
        Claim(f"state, {name}", size, None, None, TARGET_BYTES, "bytes", 1, False),
    ]
    for peer in PEERS:
        theirs = found[peer]
        if isinstance(theirs, Absent):
            reason = {"reason": str(theirs)}
            rows.append(
                Claim(
                    f"{name}: {peer} NOT MEASURED", seconds, None, None, TARGET_SECONDS, "seconds", runs, False, reason
                )
            )
            continue
        ratio = theirs["seconds"] / seconds
        label = f"first batch, {name}: against {peer} ({theirs['how']}, state {theirs['state_bytes']} bytes)"
        rows.append(Claim(label, seconds, theirs["seconds"], ratio, 1.0, "seconds", runs, False, theirs))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 000 and 10 000 samples, one run")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    options = parser.parse_args()
    sizes, runs = ((2000, 10_000), 1) if options.quick else ((10_000, 100_000), 3)
    rows, ours = [], []
    for samples in sizes:
        with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
            source = make_blocks(Path(scratch) / "blocks", samples)
            found = {side: measure(side, source, Path(scratch), samples, runs) for side in ("ours", *PEERS)}
        rows += claims(samples, found, runs)
        ours.append(rows[-len(PEERS) - 2].ours)
    growth = ours[1] / ours[0]
    rows.append(
        Claim(f"first batch at {sizes[1]:,} over {sizes[0]:,}", growth, None, None, TARGET_GROWTH, "times", runs, False)
    )
    write_receipt(rows, options.out, ["torch", "numpy"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
