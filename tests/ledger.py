"""Whether a run read every sample of every epoch exactly once, by the ledgers of its ranks (`train.sample_ledger`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.load import load_recipe
from pipeline.config.recipe_file import RESOLVED_RECIPE
from pipeline.stages.registry import stage_class


@dataclass(frozen=True)
class Count:
    """What the ledgers of a run say, over all of its ranks and interruptions."""

    steps: int
    epochs: int
    """Finished ones."""
    lost: int
    """Samples of which a token (or the clip) was read less often than there were finished epochs."""
    repeated: int
    """Samples of which a token (or the clip) was read twice in an epoch."""
    order: list[str]
    """Steps that are missing, double or out of place."""

    @property
    def problems(self) -> list[str]:
        counts = {"lost": self.lost, "repeated": self.repeated}
        return [*(f"{number} samples {name}" for name, number in counts.items() if number), *self.order]


def read_ledger(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """Rank -> its rows."""
    paths = sorted((run_dir / "logs").glob("ledger-rank-*.jsonl"))
    assert paths, f"{run_dir}/logs holds no ledger: set train.sample_ledger=true"
    return {int(path.stem.rpartition("-")[2]): _rows(path) for path in paths}


def count(run_dir: Path) -> Count:
    """Count over all ranks and attempts of a run whose sources have no weights.

    Counted against the index, not against the plan's order: every token of a document, or every clip, is read once per
    finished epoch, and at most once in the one that is open.
    """
    recipe = load_recipe(run_dir / RESOLVED_RECIPE)
    plan = stage_class(recipe.stage).plans(recipe).train
    tokens = plan.options.kind == "pack"
    samples = np.arange(len(plan.samples))
    lengths = plan.samples.columns["tokens"][samples] if tokens else np.ones_like(samples)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    read = np.zeros(starts[-1], dtype=np.int64)
    by_rank = read_ledger(run_dir)
    rows = [row for rows in by_rank.values() for row in rows]
    for sample, start, length in (element for row in rows for element in row["read"]):
        begin = starts[sample] + (start if tokens else 0)
        read[begin : begin + (length if tokens else 1)] += 1
    epochs = max(rows, key=lambda row: row["consumed"])["epoch"]
    by_sample = np.repeat(samples, lengths)
    lost, repeated = (len(np.unique(by_sample[wrong])) for wrong in (read < epochs, read > epochs + 1))
    return Count(len({row["step"] for row in rows}), epochs, lost, repeated, _order(by_rank, recipe.train.global_batch))


def _order(by_rank: dict[int, list[dict[str, Any]]], global_batch: int) -> list[str]:
    """Every step once per rank that took it, with the next items of the plan; rank 0 takes them all."""
    problems = []
    for rank, rows in by_rank.items():
        steps = [row["step"] for row in rows]
        if steps != sorted(set(steps)) or (rank == 0 and steps != list(range(1, len(steps) + 1))):
            problems.append(f"rank {rank} wrote down the steps {steps}")
        if any(row["consumed"] != row["step"] * global_batch for row in rows):
            problems.append(f"rank {rank}: a step is not at its place in the plan")
    return problems


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
