"""When a checkpoint is saved."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.dist import Ranks
from pipeline.engine.observers import save as saving
from pipeline.engine.observers.base import FinishedStep, Wishes
from pipeline.engine.observers.save import Save
from pipeline.engine.phases import Phases
from pipeline.engine.signals import StopFlag
from pipeline.engine.state import TrainState


class Saver:
    """Writes down what it is told."""

    def __init__(self, training: Any) -> None:
        self.done_here, self.told = False, list[str]()

    def begin(self, best: bool, outputs: bool) -> dict[str, float]:
        self.told.append("begin best" if best else "begin with outputs" if outputs else "begin")
        assert outputs or not best
        return {"began": 1.0}

    def advance(self) -> dict[str, float]:
        self.told.append("advance")
        return {"advanced": 1.0}

    def finish(self) -> dict[str, float]:
        self.told.append("finish")
        return {}


@pytest.fixture(autouse=True)
def without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "Saver", Saver)


def training(rank: int = 0, every_steps: int = 0, every_minutes: float = 0.0) -> Any:
    rules = SimpleNamespace(every_steps=every_steps, every_minutes=every_minutes)
    recipe = SimpleNamespace(train=SimpleNamespace(checkpoint=rules))
    return SimpleNamespace(
        recipe=recipe, ranks=Ranks(rank, rank, 2), state=TrainState(step=6), phases=Phases(), stop=StopFlag(),
        total_steps=9,
    )  # fmt: skip


def told(training: Any, wishes: Wishes, votes: int = 0, last: bool = False) -> list[str]:
    unread: Any = None
    save, before = Save(training), time.monotonic()
    metrics = save.on_step(FinishedStep(unread, 1, 1, 0.1, {}, last), wishes, votes)
    told: Any = save.saver
    assert metrics == ({"advanced": 1.0} if "advance" in told.told else {}) | (
        {"began": 1.0} if "begin" in "".join(told.told) else {}
    )
    assert (save.last_save >= before) == ("began" in metrics)
    return list(told.told)


def test_a_checkpoint_is_due_by_steps_votes_and_wishes() -> None:
    assert told(training(), Wishes()) == []
    assert told(training(every_steps=3), Wishes()) == ["begin"]
    assert told(training(every_steps=4), Wishes()) == []
    assert told(training(), Wishes(), votes=3) == ["begin"]
    assert told(training(), Wishes(save=True)) == ["begin with outputs"]
    assert told(training(), Wishes(save=True, best=True)) == ["begin best"]


def test_before_a_stop_and_at_the_end_it_waits_for_the_write() -> None:
    assert told(training(), Wishes(), last=True) == ["begin with outputs", "finish"]
    assert told(training(), Wishes(stop=True)) == ["begin with outputs", "finish"]
    for wishes, step, waits in ((Wishes(save=True), 6, []), (Wishes(save=True, stop=True), 6, ["finish"]),
                                (Wishes(save=True), 9, ["finish"])):  # fmt: skip
        run = training()
        run.state.step = step
        save = Save(run)
        assert save.on_start(wishes) == {"began": 1.0}
        assert save.saver.told == ["begin with outputs", *waits]  # type: ignore[attr-defined]
    assert Save(training()).on_start(Wishes()) == {}


def test_the_one_on_its_way_moves_on_once_all_ranks_are_done() -> None:
    assert told(training(), Wishes(), votes=1) == []
    assert told(training(), Wishes(), votes=2) == ["advance"]
    assert told(training(), Wishes(), votes=3 + 1) == ["begin"]
    assert told(training(every_steps=3), Wishes(), votes=3 + 2) == ["advance", "begin"]


def test_amid_skipped_steps_a_checkpoint_waits() -> None:
    """The newest one stays good; a stop saves all the same, and a rollback begins anew."""
    unread: Any = None
    applied = FinishedStep(unread, 1, 1, 0.1, {}, last=False)
    skipped = replace(applied, applied=False)
    run = training(every_steps=3)
    save = Save(run)
    saver: Any = save.saver
    assert save.on_step(skipped, Wishes(), 0) == {}
    run.state.step = 7
    assert save.on_step(skipped, Wishes(), 0) == {} and saver.told == []
    assert save.on_step(applied, Wishes(), 0) == {"began": 1.0} and save.on_step(applied, Wishes(), 0) == {}
    assert save.on_step(skipped, Wishes(stop=True), 0) == {"began": 1.0}
    run.state.step, saver.told[:] = 9, []
    save.on_step(skipped, Wishes(), 0)
    assert save.on_step(skipped, Wishes(stop=True, rollback="trouble"), 0) == {} and saver.told == ["finish"]
    save.on_rollback()
    run.state.step = 7
    assert save.on_step(applied, Wishes(), 0) == {} and saver.told == ["finish"]


def test_minutes_are_those_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Save(training(rank, every_minutes=10.0)) for rank in (0, 1)]
    assert [save.vote() for save in ranks] == [0, 0]
    later = ranks[0].last_save + 601
    monkeypatch.setattr(saving.time, "monotonic", lambda: later)
    assert [save.vote() for save in ranks] == [3, 0]
    for save in ranks:
        save.saver.done_here = True  # type: ignore[misc]
    assert [save.vote() for save in ranks] == [4, 1]
    never = Save(training(every_minutes=0.0))
    never.last_save = 0.0
    assert never.vote() == 0
