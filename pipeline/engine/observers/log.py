"""Loss, learning rate, speed: one row of metrics per interval of `train.log_every_steps`."""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import dataclass, field

import torch

from pipeline import dist
from pipeline.engine.metrics import peak_tflops
from pipeline.engine.observers import evaluate
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.stragglers import Stragglers, ratios
from pipeline.engine.training import Training

logger = logging.getLogger(__name__)


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
        self.stragglers = Stragglers(training.recipe.train.health.straggler_ratio)
        self.hosts: list[str] = []
        """Of the ranks."""

    def on_start(self, wishes: Wishes) -> Metrics:
        self.hosts = dist.gather_objects(socket.gethostname())
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
        own = (self.training.engine.own_time.take(), interval.wait_seconds)
        of_ranks = dist.host_numbers([*sums.values(), *own])
        *columns, own_seconds, wait_seconds = ([*column] for column in zip(*of_ranks, strict=True))
        totals = {name: float(sum(column)) for name, column in zip(sums, columns, strict=True)}
        seconds = time.monotonic() - interval.start
        row = {f"train/{name}": value for name, value in stage.reduce(totals).items()}
        row |= {
            "train/lr": step.learning_rate,
            **{f"train/lr/{part}": rate for part, rate in step.part_rates.items()},
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
        if len(of_ranks) > 1:
            row["data/slowest_wait"] = max(wait_seconds)
            row |= self._slowest(own_seconds)
        return row

    def _slowest(self, own_seconds: list[float]) -> Metrics:
        """Which rank computes longest; a rank that stays slow, or no longer is, is named.

        Args:
            own_seconds: of every rank in this interval.
        """
        times = ratios(own_seconds)
        for rank, by, slow in self.stragglers.changes(own_seconds):
            if self.training.ranks.is_main:
                what = f"computes {by:.2f} times as long as the median rank" if slow else "is no longer slow"
                logger.warning(
                    "%s step %d: rank %d on %s %s",
                    self.training.recipe.name, self.training.state.step, rank, self.hosts[rank], what,
                )  # fmt: skip
        slowest = max(range(len(times)), key=times.__getitem__)
        return {"perf/slowest_rank": slowest, "perf/straggler_ratio": times[slowest]}


def _fetched(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """This rank's sums, by name, in one copy from the device."""
    names = sorted(sums)
    numbers = torch.stack([sums[name].double().reshape(()) for name in names]).tolist()
    return dict(zip(names, numbers, strict=True))
