"""How well the order of an epoch is mixed, beside a full shuffle; and how many shards a host reads from meanwhile.

    python benchmarks/shuffle_quality.py [--quick] [--out FILE]

Two measures of mixing: the share of neighbours in the order that are neighbours on disk (at most 32 apart; lower is
better), and from how many places a global batch of 32 comes (distinct ranges of 500 samples; higher is better). The
peer is a full shuffle, the best there is and the worst to read. Then, for worlds of 1, 8 and 64 hosts, the shards that
one host touches while the run reads a window of 16 384 samples, against the samples it reads in it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
from receipt import Claim, write_receipt

from shards.order.shuffle import BLOCK, LANES, WINDOW, Stream, permutation

NEIGHBOURS, PLACE, GLOBAL_BATCH, SAMPLES_PER_SHARD = 32, 500, 32, 1000
WITHIN = 0.5  # at least half as good as a full shuffle
REACH = LANES * WINDOW


def close_neighbours(order: np.ndarray) -> float:
    """Share of consecutive samples that are at most 32 apart on disk."""
    return float((np.abs(np.diff(order)) <= NEIGHBOURS).mean())


def places_per_batch(order: np.ndarray) -> float:
    """Distinct ranges of 500 samples that a global batch comes from, on average."""
    whole = len(order) // GLOBAL_BATCH * GLOBAL_BATCH
    places = np.sort(order[:whole].reshape(-1, GLOBAL_BATCH) // PLACE, axis=1)
    return float(((np.diff(places, axis=1) > 0).sum(axis=1) + 1).mean())


def mixing(samples: int, seeds: int) -> list[Claim]:
    """Both measures, medians over seeds. A share of zero counts as one pair of neighbours."""
    ours = [Stream(samples, seed, 0).take(0, samples) for seed in range(seeds)]
    full = [permutation(samples, 99, seed) for seed in range(seeds)]
    close, close_full = (
        statistics.median(max(close_neighbours(o), 1 / samples) for o in side) for side in (ours, full)
    )
    places, places_full = (statistics.median(map(places_per_batch, side)) for side in (ours, full))
    name = f"{samples:,} samples (peer: full shuffle)"
    return [
        Claim(f"close neighbours, {name}", close, close_full, close_full / close, WITHIN, "share", seeds, False),
        Claim(f"places in a batch of 32, {name}", places, places_full, places / places_full, WITHIN, "ranges", seeds),
    ]


def shards_per_host(samples: int, hosts: int) -> Claim:
    """Most shards that one host of one rank and micro-batch 1 touches in a window; documented bound as the target."""
    order = Stream(samples, 0, 0).take(0, min(samples, 8 * REACH))
    most, full = 0, 0
    for first in range(0, len(order) - REACH + 1, REACH):
        for host in range(hosts):
            mine = order[first : first + REACH][host::hosts]
            most = max(most, len(np.unique(mine // SAMPLES_PER_SHARD)))
    full = len(np.unique(permutation(samples, 99, 0)[: REACH // hosts] // SAMPLES_PER_SHARD))
    bound = min(-(-LANES // hosts) * (WINDOW // BLOCK + 2) * 2, -(-samples // SAMPLES_PER_SHARD))
    name = f"shards a host of {hosts} touches in {REACH:,} of {samples:,} samples (peer: full shuffle; target: bound)"
    detail = {"samples_per_shard": SAMPLES_PER_SHARD, "samples_per_host": REACH // hosts}
    return Claim(name, float(most), float(full), None, float(bound), "shards", 1, False, detail=detail)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, up to 100 000 samples")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    options = parser.parse_args()
    sizes = (10_007, 100_000) if options.quick else (10_007, 100_000, 1_000_000)
    rows = [claim for samples in sizes for claim in mixing(samples, 1 if options.quick else 5)]
    rows += [shards_per_host(sizes[-1], hosts) for hosts in (1, 8, 64)]
    write_receipt(rows, options.out, ["numpy"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
