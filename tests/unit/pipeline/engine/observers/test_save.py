"""When a checkpoint is saved."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.dist import Ranks
from pipeline.engine.observers import save as saving
from pipeline.engine.observers.base import FinishedStep, Wishes
from pipeline.engine.observers.save import Save
from pipeline.engine.state import TrainState


def training(rank: int = 0, every_steps: int = 0, every_minutes: float = 0.0) -> Any:
    rules = SimpleNamespace(every_steps=every_steps, every_minutes=every_minutes)
    recipe = SimpleNamespace(train=SimpleNamespace(checkpoint=rules))
    return SimpleNamespace(recipe=recipe, ranks=Ranks(rank, rank, 2), state=TrainState(step=6))


def saves(monkeypatch: pytest.MonkeyPatch, training: Any, wishes: Wishes, votes: int = 0, last: bool = False) -> int:
    saved: list[bool] = []
    monkeypatch.setattr(Save, "_save", lambda save, best: saved.append(best))
    unread: Any = None
    step = FinishedStep(unread, valid_tokens=1, samples=1, learning_rate=0.1, sums={}, last=last)
    assert Save(training).on_step(step, wishes, votes) == {}
    assert saved in ([], [wishes.best])
    return len(saved)


def test_a_checkpoint_is_due_by_steps_votes_and_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert saves(monkeypatch, training(), Wishes()) == 0
    assert saves(monkeypatch, training(every_steps=3), Wishes()) == 1
    assert saves(monkeypatch, training(every_steps=4), Wishes()) == 0
    assert saves(monkeypatch, training(), Wishes(), votes=1) == 1
    assert saves(monkeypatch, training(), Wishes(), last=True) == 1
    for wishes in (Wishes(stop=True), Wishes(save=True), Wishes(save=True, best=True)):
        assert saves(monkeypatch, training(), wishes) == 1


def test_minutes_are_those_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Save(training(rank, every_minutes=10.0)) for rank in (0, 1)]
    assert [save.vote() for save in ranks] == [0, 0]
    later = ranks[0].last_save + 601
    monkeypatch.setattr(saving.time, "monotonic", lambda: later)
    assert [save.vote() for save in ranks] == [1, 0]
    never = Save(training(every_minutes=0.0))
    never.last_save = 0.0
    assert never.vote() == 0
