"""Who has a turn when: observers in their order, rows to all sinks at once, stops, errors."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import dist
from pipeline.config.train_schema import CheckpointConfig
from pipeline.config.transfer_schema import AveragingConfig
from pipeline.engine import trainer as trainers
from pipeline.engine.gate import Gate
from pipeline.engine.observers import registry
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.observers.evaluate import Evaluate
from pipeline.engine.observers.save import Save
from pipeline.engine.phases import Phases
from pipeline.engine.signals import StopFlag
from pipeline.engine.sinks.base import Sink
from pipeline.engine.state import TrainState
from pipeline.engine.trainer import Trainer
from pipeline.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED
from shards.load.requests import StepBatch
from shards.order.plan import Cursor


class Loader:
    def __iter__(self) -> Iterator[StepBatch]:
        while True:
            yield StepBatch([{"valid_tokens": 5, "samples": 2, "maxima": {}}], Cursor(), [], 0.0, 2)

    def state_dict(self, after: StepBatch) -> dict[str, Any]:
        return {"epoch": 0}


def training(steps: int = 2, done: int = 0) -> Any:
    """A run without a model."""
    train = SimpleNamespace(checkpoint=CheckpointConfig(), averaging=AveragingConfig())
    recipe = SimpleNamespace(name="a-run", data=SimpleNamespace(max_bad_samples=0), train=train)
    return SimpleNamespace(
        recipe=recipe, ranks=dist.Ranks(0, 0, 1), device=torch.device("cpu"), loader=Loader(), stop=StopFlag(),
        engine=SimpleNamespace(set_learning_rate=lambda step: 0.1 * step, part_rates={}, gate=Gate()), stage=None,
        state=TrainState(step=done), total_steps=steps, resolved=None, phases=Phases(),
    )  # fmt: skip


class Watch(Observer):
    """Writes down its turns."""

    def __init__(self, training: Any, name: str, turns: list[str]) -> None:
        super().__init__(training)
        self.name, self.turns = name, turns

    def on_start(self, wishes: Wishes) -> dict[str, float]:
        self.turns.append(f"{self.name} start")
        return {f"{self.name}/start": 0.0}

    def vote(self) -> int:
        return 3 if self.name == "a" else 4

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> dict[str, float]:
        self.turns.append(f"{self.name} step {votes} {step.valid_tokens} {step.learning_rate} {step.last}")
        return {f"{self.name}/step": 1.0} if self.name == "a" else {}

    def on_end(self) -> None:
        self.turns.append(f"{self.name} end")


class Lines(Sink):
    def __init__(self, training: Any, turns: list[str]) -> None:
        super().__init__(training)
        self.turns = turns

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.turns.append(f"{step} {sorted(metrics)[0]}")

    def end(self) -> None:
        self.turns.append("no more rows")

    def close(self) -> None:
        self.turns.append("closed")


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "accumulate", lambda engine, stage, batches, normaliser: {})


def test_turns_of_observers_and_sinks() -> None:
    turns: list[str] = []
    run = training()
    assert Trainer(run, [Watch(run, "a", turns), Watch(run, "b", turns)], [Lines(run, turns)]).fit() == EXIT_OK
    assert turns == [
        "a start", "0 a/start", "b start", "0 b/start",
        "a step 3 5 0.0 False", "1 a/step", "b step 4 5 0.0 False",
        "a step 3 5 0.1 True", "2 a/step", "b step 4 5 0.1 True",
        "no more rows", "a end", "b end", "closed",
    ]  # fmt: skip
    assert (run.state.step, run.state.tokens_seen, run.state.samples_seen) == (2, 10, 4)


def test_an_error_only_closes() -> None:
    class Failing(Watch):
        def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> dict[str, float]:
            raise ValueError("a health check")

    turns: list[str] = []
    run = training()
    with pytest.raises(ValueError, match="a health check"):
        Trainer(run, [Failing(run, "a", turns)], [Lines(run, turns)]).fit()
    assert turns == ["a start", "0 a/start", "closed"]


@pytest.mark.parametrize(("interrupted", "code"), [(False, EXIT_PREEMPTED), (True, EXIT_INTERRUPTED)])
def test_a_request_or_a_wish_ends_the_run_behind_its_step(interrupted: bool, code: int) -> None:
    class Stopping(Observer):
        def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> dict[str, float]:
            wishes.stop = wishes.stop or not interrupted
            return {}

    run = training(steps=9)
    run.stop.requested = run.stop.interrupted = interrupted
    assert Trainer(run, [Stopping(run)], []).fit() == code
    assert run.state.step == 1


def test_a_run_may_reach_its_end_before_its_last_step() -> None:
    class Ending(Observer):
        def on_start(self, wishes: Wishes) -> dict[str, float]:
            assert wishes.metrics == ({"a/start": 0.0} if turns else {}), "of observers with earlier turns"
            wishes.stop = wishes.finished = self.training.state.step == 5
            return {}

        def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> dict[str, float]:
            wishes.stop = wishes.finished = self.training.state.step == 2
            return {}

    turns: list[str] = []
    run = training(steps=9)
    assert Trainer(run, [Ending(run)], []).fit() == EXIT_OK and run.state.step == 2
    run = training(steps=9, done=5)
    turns = ["a"]
    assert Trainer(run, [Watch(run, "a", turns), Ending(run)], []).fit() == EXIT_OK and run.state.step == 5


def test_checkpoints_come_behind_all_that_may_wish_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Added(Observer):
        """As somebody adds one, at the end of the list."""

    assert Evaluate in registry.OBSERVERS and Save not in registry.OBSERVERS
    monkeypatch.setattr(registry, "OBSERVERS", (Evaluate, Added))
    kinds = [type(observer) for observer in registry.observers_of(training(steps=3, done=0))]
    assert kinds == [Evaluate, Added, Save]


def test_a_due_evaluation_is_saved_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped in its last evaluation has only that, and the save, to do again."""
    run = training(steps=3, done=3)
    run.state.evaluation_due = True
    run.stage = SimpleNamespace(evaluate=lambda model, stop: {"eval/x": 2.0}, best_metric=("eval/x", "min"))
    run.engine = SimpleNamespace(module=torch.nn.Identity(), forward=None)
    saved: list[tuple[bool, bool, bool]] = []

    def note(save: Save, wishes: Wishes, ends: bool) -> dict[str, float]:
        saved.append((wishes.best, ends, save.training.state.evaluation_due))
        return {}

    monkeypatch.setattr(Save, "_save", note)
    assert Trainer(run, [Evaluate(run), Save(run)], []).fit() == EXIT_OK
    assert saved == [(True, True, False)] and run.state.best == {"metric": "eval/x", "value": 2.0, "step": 3}


def test_a_rollback_repeats_steps_on_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run takes as many steps as planned, and the loader goes on where it is."""

    class Numbered(Loader):
        """Steps of data by number; a state is where it stands."""

        at = 0

        def __iter__(self) -> Iterator[StepBatch]:
            while True:
                self.at += 1
                yield StepBatch([{"valid_tokens": self.at, "samples": 1, "maxima": {}}], Cursor(), [], 0.0, 1)

        def state_dict(self, after: StepBatch) -> dict[str, Any]:
            return {"epoch": 0, "consumed": after.micro_batches[0]["valid_tokens"]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.at = state["consumed"]

    class Troubled(Observer):
        def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> dict[str, float]:
            seen.append((self.training.state.step, step.valid_tokens))
            wishes.rollback = "trouble" if step.valid_tokens == 3 else ""
            return {}

        def on_rollback(self) -> None:
            turns.append(f"back at {self.training.state.step}")

    class Rows(Sink):
        def rolled_back(self, step: int) -> None:
            turns.append(f"rows up to {step}")

    def back(training: Any, reason: str, trouble_after: int | None) -> None:
        assert reason == "trouble" and trouble_after is None
        training.state.step = 1

    seen: list[tuple[int, int]] = []
    turns: list[str] = []
    run = training(steps=4)
    run.loader = Numbered()
    monkeypatch.setattr(trainers, "roll_back", back)
    assert Trainer(run, [Troubled(run)], [Rows(run)]).fit() == EXIT_OK
    assert seen == [(1, 1), (2, 2), (3, 3), (2, 4), (3, 5), (4, 6)]
    assert turns == ["back at 1", "rows up to 1"] and run.state.data["consumed"] == 6
