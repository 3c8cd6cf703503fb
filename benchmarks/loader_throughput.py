"""CPU seconds per sample of the loader against webdataset, wids, energon, mosaicml-streaming and litdata.

    python benchmarks/loader_throughput.py [--quick] [--workload clips|blocks|documents] [--out FILE]

Every side runs in a process of its own over the same content (the peers' environment: benchmarks/peers/environment.py)
and delivers the same things (benchmarks/peers/workloads.py). CPU time of the main process and all workers is counted,
because a training node has few cores to spare per device; wall time is in the receipt's details. Each figure is the
median of several windows, read once every worker of a side works; what its start took is in the details (seconds to
the first batch, seconds and CPU-seconds until all worked). Ours checks the CRC-32 of everything it reads; of the peers
none checks anything (the details hold our figure without checksums too).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from loader_data import make_blocks, make_clips, make_documents
from peers.environment import PEERS, Absent, ask, versions
from receipt import Claim, write_receipt

MAKE = {"clips": make_clips, "blocks": make_blocks, "documents": make_documents}
FULL = {"clips": 4000, "blocks": 60_000, "documents": 300_000}
QUICK = {"clips": 2000, "blocks": 12_000, "documents": 200_000}
SAID = {"clips": "clips of 200 KB", "blocks": "blocks of 2048 tokens", "documents": "short documents in packs of 1024"}
WINDOW = 0.4
"""Part of the set in one window; a hundred batches or more in a full run, as up to 32 of ours are on their way."""


def target(workload: str, workers: int, peer: str) -> float:
    """How many times the samples per CPU-second of a peer are wanted."""
    if peer != "webdataset":
        return 1.0
    if not workers:
        return 7.0
    return 2.5 if workload == "clips" else 3.0


def prepare(workload: str, source: Path, scratch: Path) -> dict[str, Path | Absent]:
    """Every side's own form of the set, or why it has none."""
    found: dict[str, Path | Absent] = {}
    for side in ("ours", *PEERS):
        out = scratch / f"{workload}-{side}"
        try:
            ask(side, "prepare", {"source": str(source), "out": str(out), "kind": workload})
            found[side] = out
        except Absent as reason:
            found[side] = reason
    return found


def measure(side: str, place: Path | Absent, arguments: dict[str, Any]) -> dict[str, Any] | Absent:
    if isinstance(place, Absent):
        return place
    try:
        return ask(side, "throughput", {"folder": str(place), **arguments})
    except Absent as reason:
        return reason


def compare(workload: str, places: dict[str, Path | Absent], arguments: dict[str, Any]) -> list[Claim]:
    """Ours against every peer, in one setting."""
    ours = measure("ours", places["ours"], arguments)
    if isinstance(ours, Absent):
        raise SystemExit(f"our own side failed: {ours}")
    order = "shuffled" if arguments["shuffle"] else "sequential"
    name = f"{SAID[workload]}, {arguments['workers']} workers, {order}"
    unchecked = measure("unchecked", places["ours"], arguments)
    ours["without checksums"] = unchecked if isinstance(unchecked, dict) else str(unchecked)
    rows = []
    for peer in PEERS:
        theirs = measure(peer, places[peer], arguments)
        rows.append(claim(f"{name}: against {peer}", ours, theirs, target(workload, arguments["workers"], peer)))
    return rows


def claim(name: str, ours: dict[str, Any], theirs: dict[str, Any] | Absent, wanted: float) -> Claim:
    """A row; a peer that could not be measured has one too, with the reason and without a target."""
    rate, runs, unit = 1 / median(ours["cpu"]), len(ours["cpu"]), "samples per CPU-second"
    if isinstance(theirs, Absent):
        return Claim(f"{name} NOT MEASURED", rate, None, None, 0.0, unit, runs, detail={"reason": str(theirs)})
    other = 1 / median(theirs["cpu"])
    detail = {
        "versions": versions(),
        "ours": ours,
        "peer": theirs,
        "wall_ratio": median(theirs["wall"]) / median(ours["wall"]),
    }
    return Claim(name, rate, other, rate / other, wanted, unit, runs, detail=detail)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less data, three windows, shuffled only")
    parser.add_argument("--workload", choices=sorted(MAKE), help="only this one")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    options = parser.parse_args()
    sizes, runs = (QUICK, 3) if options.quick else (FULL, 5)
    rows = []
    for workload in [options.workload] if options.workload else list(MAKE):
        with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
            source = MAKE[workload](Path(scratch) / workload, sizes[workload])
            places = prepare(workload, source, Path(scratch))
            for shuffle in (True,) if options.quick else (False, True):
                for workers in (0, 2):
                    samples = int(sizes[workload] * WINDOW)
                    arguments = {"kind": workload, "workers": workers, "shuffle": shuffle}
                    rows += compare(workload, places, {**arguments, "samples": samples, "runs": runs})
    written = write_receipt(rows, options.out, ["torch", "numpy"])
    return 0 if written and all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
