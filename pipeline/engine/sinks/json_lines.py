"""``metrics.jsonl`` in the run directory: one JSON object per row, in every run."""

from __future__ import annotations

import json
import time
from typing import TextIO

from pipeline.engine.durable import named_if_unwritable
from pipeline.engine.metrics import drop_rows_after
from pipeline.engine.sinks.base import Metrics, Sink
from pipeline.engine.training import Training


class JsonLines(Sink):
    """Appends every row; first drops rows of steps that a resumed run will repeat, like those of undone steps later."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.path = training.run_dir / "metrics.jsonl"
        with named_if_unwritable(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._continued(training.state.step)

    def _continued(self, step: int) -> TextIO:
        """The file behind the rows up to a step."""
        with named_if_unwritable(self.path):
            drop_rows_after(self.path, step)
            return self.path.open("a", encoding="utf-8")

    def rolled_back(self, step: int) -> None:
        self.end()
        self._file = self._continued(step)

    def write(self, step: int, metrics: Metrics) -> None:
        row = {"step": step, "time": round(time.time(), 3), **metrics}
        with named_if_unwritable(self.path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def end(self) -> None:
        with named_if_unwritable(self.path):
            self._file.close()
