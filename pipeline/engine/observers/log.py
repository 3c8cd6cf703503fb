"""Loss, learning rate, speed: one row of metrics per interval of `train.log_every_steps`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from pipeline import dist
from pipeline.engine.metrics import peak_tflops
from pipeline.engine.observers import evaluate
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.training import Training


@dataclass(slots=True)
class Interval:
    """What was counted since the last row."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    applied: int = 0
    tokens: int = 0
    samples: int = 0
    flops: float = 0.0
    wait_seconds: float = 0.0
    start: float = field(default_factory=time.monotonic)

    def add(self, step: FinishedStep, flops: float) -> None:
        if step.applied and not self.applied:
            self.sums = {}
        if step.applied or not self.applied:  # a loss that is not finite is shown only if there is no other
            for name, value in step.sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + value.double()
        self.applied += step.applied
        self.steps += 1
        self.tokens += step.valid_tokens
        self.samples += step.samples
        self.flops += flops
        self.wait_seconds += step.batch.wait_seconds


class Log(Observer):
    """Sums over the steps of an interval, reduced over ranks once when it ends."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        name = torch.cuda.get_device_name() if training.device.type == "cuda" else "cpu"
        self.peak = peak_tflops(training.recipe.train, name)
        self.interval = Interval()

    def on_start(self, wishes: Wishes) -> Metrics:
        self.interval = Interval()
        return {}

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        flops = 0.0
        if self.peak is not None:  # lengths on the host: reading them from a device would wait for it
            flops = self.training.stage.flops_per_step(list(step.batch.micro_batches))
        self.interval.add(step, flops)
        due = self.training.state.step % self.training.recipe.train.log_every_steps == 0
        # a stop during the evaluation that follows would take the open interval along
        if not (due or evaluate.follows(self.training, step) or wishes.stop):
            return {}
        row = self._row(self.interval, step)
        self.interval = Interval()
        return row

    def on_rollback(self) -> None:
        self.interval = Interval()

    def _row(self, interval: Interval, step: FinishedStep) -> Metrics:
        """All ranks must call."""
        state, stage = self.training.state, self.training.stage
        sums = _fetched(interval.sums)
        totals = dict(zip(sums, dist.host_sums(list(sums.values())), strict=True))
        seconds = time.monotonic() - interval.start
        row = {f"train/{name}": value for name, value in stage.reduce(totals).items()}
        row |= {
            "train/lr": step.learning_rate,
            "train/grad_norm": step.grad_norm,
            "train/skipped_steps": state.skipped_total,
            "train/skipped_in_a_row": state.skipped_steps,
            "train/spikes": state.spikes,
            "train/rollbacks": state.rollbacks,
            "train/epoch": state.data["epoch"],
            "data/wait_seconds": interval.wait_seconds,
            "data/bad_samples": len(state.bad_samples),
            "perf/seconds_per_step": seconds / interval.steps,
            "perf/tokens_per_second": interval.tokens / seconds,
            "perf/samples_per_second": interval.samples / seconds,
        }
        if self.peak is not None and interval.flops:
            row["perf/mfu"] = interval.flops / seconds / (self.peak * 1e12)
        return row


def _fetched(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """This rank's sums, by name, in one copy from the device."""
    names = sorted(sums)
    numbers = torch.stack([sums[name].double().reshape(()) for name in names]).tolist()
    return dict(zip(names, numbers, strict=True))
