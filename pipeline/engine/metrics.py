"""Metrics of a run: their file, their text for people, and the peak that utilisation refers to.

Names: ``train/loss``, ``train/grad_norm``, ``data/wait_seconds``, ``perf/tokens_per_second``, ``eval/...``.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from pipeline.config.train_schema import TrainConfig
from shards.atomic import write_atomic

logger = logging.getLogger(__name__)

# Dense bf16 peak in TFLOP/s, from the vendors' data sheets. The first name that is a part of the device's counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0,
    "L40S": 362.0, "L40": 181.0, "B200": 2250.0, "4090": 165.0, "L4": 121.0,
}  # fmt: skip


def peak_tflops(config: TrainConfig, device_name: str) -> float | None:
    """The recipe's figure, or the data sheet's for a known device; None if no peak is known."""
    if config.peak_tflops is not None:
        return config.peak_tflops
    return data_sheet_tflops(device_name)


def data_sheet_tflops(device_name: str) -> float | None:
    """Of a whole device; None for one that is not known, and for a slice of one (MIG)."""
    if " MIG " in device_name:
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def drop_rows_after(path: Path, last: int, field: str = "step") -> None:
    """Atomically remove rows of later steps (a killed run may have logged beyond its last checkpoint).

    Args:
        path: JSON lines; need not exist.
        last: the largest value of ``field`` that stays.
        field: a number that grows from row to row.
    """
    if not path.exists():
        return
    kept_lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # a line that kill -9 cut in half
            logger.warning("%s: dropped an incomplete line", path)
            continue
        if row[field] <= last:
            kept_lines.append(line)
    write_atomic(path, "".join(line + "\n" for line in kept_lines))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every row of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def describe(metrics: dict[str, float]) -> str:
    """A metrics dict as one log line; tiny and huge values in scientific notation."""

    def number(value: float) -> str:
        if not math.isfinite(value):
            return str(value)
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"

    return "  ".join(f"{name.split('/', 1)[-1]} {number(value)}" for name, value in metrics.items())
