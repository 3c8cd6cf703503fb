"""Writes down where the time of this attempt goes (`pipeline.engine.goodput`)."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from pipeline.engine.durable import named_if_unwritable, write_durably
from pipeline.engine.goodput import NAME, read_rows, split
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.training import Training

logger = logging.getLogger(__name__)

_LEAST_SECONDS, _TIMES_ITS_COST = 1.0, 200
"""Between two writes: at least this, and so long that they take no more than half a percent of the time."""


class Attempt(Observer):
    """Keeps this attempt's row of ``run_dir/goodput.jsonl`` on rank 0, between steps, and says at the end where the
    time of the run went."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        state = training.state
        self.path = training.run_dir / NAME
        self.first_step, self.undone_before, self.steps = state.step, state.undone_steps, 0
        self.started = time.time() - sum(training.phases.seconds().values())
        self.earlier = read_rows(training.run_dir) if training.ranks.is_main else []
        self.repeated = max(self.earlier[-1]["step"] - state.step, 0) if self.earlier else 0
        self.next_write = 0.0

    def on_start(self, wishes: Wishes) -> Metrics:
        self._write()
        return {}

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        self.steps += 1
        if time.monotonic() >= self.next_write:
            self._write()
        return {}

    def on_rollback(self) -> None:
        self._write()

    def on_end(self) -> None:
        self._write()
        if self.training.ranks.is_main:
            logger.info("%s: %s", self.training.recipe.name, split([*self.earlier, self._row()]).describe())

    def _row(self) -> dict[str, Any]:
        training = self.training
        state, phases = training.state, training.phases.seconds()
        return {
            "started": round(self.started, 3), "updated": round(self.started + sum(phases.values()), 3),
            "world_size": training.ranks.world_size, "first_step": self.first_step, "step": state.step,
            "steps": self.steps, "undone_steps": state.undone_steps - self.undone_before,
            "repeated_steps": self.repeated, "phases": {name: round(spent, 3) for name, spent in phases.items()},
        }  # fmt: skip

    def _write(self) -> None:
        if not self.training.ranks.is_main:
            return
        begin = time.monotonic()
        with named_if_unwritable(self.path):
            write_durably(self.path, "".join(json.dumps(row) + "\n" for row in [*self.earlier, self._row()]))
        end = time.monotonic()
        self.next_write = end + max(_LEAST_SECONDS, _TIMES_ITS_COST * (end - begin))
