"""Which samples every step of this rank was made of, if `train.sample_ledger` is set: what proves that nothing is lost
or repeated over any number of interruptions."""

from __future__ import annotations

import json

from pipeline.config.schema import Recipe
from pipeline.engine.durable import named_if_unwritable
from pipeline.engine.metrics import drop_rows_after
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.sinks.base import Metrics
from pipeline.engine.training import Training

NAME = "ledger-rank-{}.jsonl"


class Ledger(Observer):
    """Appends a row per step to ``run_dir/logs/ledger-rank-N.jsonl``.

    A row: ``step``, ``consumed`` (items of the plan up to here, over all ranks), ``epoch`` after the step, ``read``
    ([sample, start, length] of every element, as the plan numbers them) and ``replaced`` ([sample, substitute] of the
    damaged ones among them).

    Rows that a resumed run repeats are dropped by the cursor, not by the step: it is the one that never goes back.
    """

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        recipe, ranks, folder = training.recipe, training.ranks, training.run_dir / "logs"
        # ranks that share a pack all read it
        self.writes = ranks.rank % recipe.train.sequence_parallel == 0
        consumed = training.state.data["consumed"] if training.state.step else 0
        self.path = folder / NAME.format(ranks.rank)
        with named_if_unwritable(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(NAME.format("*")):
                # also the files of ranks that are no longer there, each by one rank
                if int(path.stem.rpartition("-")[2]) % ranks.world_size == ranks.rank:
                    drop_rows_after(path, consumed, "consumed")
            self._file = self.path.open("a", encoding="utf-8") if self.writes else None

    @classmethod
    def enabled(cls, recipe: Recipe) -> bool:
        return recipe.train.sample_ledger

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> Metrics:
        if self._file is not None:
            cursor = step.batch.cursor_after
            row = {
                "step": self.training.state.step, "consumed": cursor.consumed, "epoch": cursor.epoch,
                "read": step.batch.read(),
                "replaced": [[bad.sample, bad.substitute] for bad in step.batch.skipped],
            }  # fmt: skip
            with named_if_unwritable(self.path):
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()
        return {}

    def on_end(self) -> None:
        if self._file is not None:
            self._file.close()
