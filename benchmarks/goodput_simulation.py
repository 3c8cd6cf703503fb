"""Goodput of long runs on 64 and 1,024 GPUs, simulated from measured times at a published rate of failures.

Goodput is the part of the time that goes into steps which are kept. A failure loses what was done since the last
complete checkpoint and the time until the next step. Failures come at random (exponential, also during a restart), at
the rate of Llama 3's 54 days on 16,384 GPUs: 419 unexpected interruptions, one per 50.7 thousand GPU-hours (arXiv
2407.21783). The interval between checkpoints is Young's and Daly's (CACM 17(9) 1974; FGCS 22(3) 2006), but not less
than the time a checkpoint takes to be written beside the training.

Times are read from the receipts of this folder: the stall and the background write of a checkpoint, and the time from a
failure to the next step. They were measured on a small model, so all is simulated again with times ten and a hundred
times as long. A closed formula checks the simulation.

    python benchmarks/goodput_simulation.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from receipt import ROOT, Claim, write_receipt

GPU_HOURS_PER_FAILURE = 50_700.0
WORLDS = (64, 1024)
TARGET = 0.95
AGREE = 0.005
"""Largest difference between simulation and formula."""
FACTORS = (1, 10, 100)


@dataclass(frozen=True)
class Times:
    """Seconds, measured."""

    stall: float
    """Training waits for a checkpoint."""
    write: float
    """From the snapshot until the checkpoint is complete, beside the training."""
    restart: float
    """From a failure to the first step after it."""

    def longer(self, factor: float) -> Times:
        return Times(*(factor * seconds for seconds in asdict(self).values()))


def interval(times: Times, mean: float) -> float:
    """Seconds of training between two checkpoints that lose the least, after Daly's second order.

    Args:
        times: measured.
        mean: seconds between failures.
    """
    if times.stall >= 2 * mean:
        return mean
    part = times.stall / (2 * mean)
    best = math.sqrt(2 * times.stall * mean) * (1 + math.sqrt(part) / 3 + part / 9) - times.stall
    return max(best, times.write)


def formula(times: Times, mean: float, every: float) -> float:
    """Expected goodput: kept intervals per failure, each of ``every`` seconds, over the mean time between failures."""
    kept = math.exp(-(times.restart + times.write) / mean) / math.expm1((every + times.stall) / mean)
    return every * kept / mean


def simulate(times: Times, mean: float, every: float, failures: int, seed: int) -> float:
    """Goodput over so many failures, one after another."""
    random = np.random.default_rng(seed)
    total = kept = 0.0
    for _ in range(failures):
        alive = float(random.exponential(mean))
        total += alive
        now = times.restart  # a failure before the first step only costs time
        complete: list[float] = []
        snapshot = now
        while now < alive:
            now += every
            snapshot = now
            now += times.stall
            complete.append(snapshot + times.stall + times.write)
        kept += every * sum(moment <= alive for moment in complete)
    return kept / total


def measured(folder: Path) -> Times:
    """From the receipts. Raises SystemExit if one is missing."""
    drills = _rows(folder / "drills.jsonl")
    stall = _rows(folder / "checkpoint_stall.jsonl")[0]
    to_next_step = next(row["detail"]["seconds_to_next_step"] for row in drills if row["claim"] == "kill a rank")
    return Times(stall["ours"], statistics.median(stall["detail"]["background_writes"]), to_next_step)


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise SystemExit(f"{path.name} is missing: run benchmarks/{path.stem}.py, or give --stall, --write, --restart")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def claims(times: Times, failures: int) -> list[Claim]:
    """Goodput of every world and factor, and how far the formula is off."""
    rows, differences = [], []
    for world in WORLDS:
        for factor in FACTORS:
            mean = GPU_HOURS_PER_FAILURE * 3600 / world
            longer = times.longer(factor)
            every = interval(longer, mean)
            found = simulate(longer, mean, every, failures, seed=world + factor)
            expected = formula(longer, mean, every)
            differences.append(abs(found - expected))
            hourly = formula(longer, mean, 3600)
            detail = {
                **asdict(longer), "gpus": world, "hours_between_failures": mean / 3600,
                "minutes_between_checkpoints": every / 60, "formula": expected, "formula_checkpoint_every_hour": hourly,
            }  # fmt: skip
            name = f"goodput on {world:,} GPUs, measured times" + ("" if factor == 1 else f" x {factor}")
            rows.append(Claim(name, found, None, None, TARGET, "", failures, detail=detail))
    name = "largest difference between simulation and closed formula"
    rows.append(Claim(name, max(differences), None, None, AGREE, "", len(differences), higher_is_better=False))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the failures")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    for name in ("stall", "write", "restart"):
        parser.add_argument(f"--{name}", type=float, help="seconds, instead of the receipts' figure")
    options = parser.parse_args()
    given = (options.stall, options.write, options.restart)
    times = measured(ROOT / "benchmarks" / "receipts") if None in given else Times(*given)
    rows = claims(times, 1000 if options.quick else 10_000)
    write_receipt(rows, options.out, ("numpy",))
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
