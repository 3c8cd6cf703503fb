"""Metrics of a run: JSONL always, TensorBoard and Weights & Biases beside it, one progress line for people.

Names: ``train/loss``, ``train/grad_norm``, ``data/wait_seconds``, ``perf/tokens_per_second``, ``eval/...``.
Only rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from pipeline.config.schema import TrainConfig
from pipeline.engine.durable import named_if_unwritable
from pipeline.errors import RecipeError
from shards.atomic import write_atomic

logger = logging.getLogger(__name__)

# Dense bf16 peak in TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0, "4090": 165.0, "L4": 121.0}


def peak_tflops(config: TrainConfig, device_name: str) -> float | None:
    """The recipe's figure, or the data sheet's for a known device; None where no peak is known."""
    if config.peak_tflops is not None:
        return config.peak_tflops
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


class MetricWriter:
    """Writes one JSON object per call; rows of steps that a resumed run will repeat are dropped first."""

    def __init__(self, run_dir: Path, config: TrainConfig, name: str, resume_step: int, enabled: bool) -> None:
        self.enabled = enabled
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        self.path = run_dir / "metrics.jsonl"
        with named_if_unwritable(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            drop_rows_after(self.path, resume_step)
            self._file = self.path.open("a", encoding="utf-8")
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with named_if_unwritable(run_dir / "tensorboard"):
                self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)
        if config.wandb_project is not None:
            self._wandb = _start_wandb(config.wandb_project, name, run_dir)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics of a finished step."""
        if not self.enabled:
            return
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        with named_if_unwritable(self.path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            with named_if_unwritable(self.path.with_name("tensorboard")):
                for name, value in metrics.items():
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def close(self) -> None:
        if not self.enabled:
            return
        with named_if_unwritable(self.path):
            self._file.close()
        if self._tensorboard is not None:
            with named_if_unwritable(self.path.with_name("tensorboard")):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(project: str, name: str, run_dir: Path) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise RecipeError(
            "train.wandb_project is set but wandb is not installed; pip install 'llava-slt[wandb]' or remove the field"
        ) from error
    return wandb.init(project=project, name=name, dir=str(run_dir), resume="allow")


def drop_rows_after(path: Path, step: int) -> None:
    """Atomically remove rows of later steps (a killed run may have logged beyond its last checkpoint)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line a kill -9 cut in half
            logger.warning("%s: dropped an incomplete line", path)
            continue
        if row["step"] <= step:
            kept.append(line)
    write_atomic(path, "".join(line + "\n" for line in kept))


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
