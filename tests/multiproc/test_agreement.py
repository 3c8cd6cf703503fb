"""The budget of damaged samples is the run's: exceeded on one rank, it stops every rank at the same step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shards.load.requests import StepBatch
from shards.load.substitute import BadSample
from shards.order.plan import Cursor
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

# (step -> damaged samples of rank 0, of rank 1); sample 5 comes up on either rank, and counts once
DAMAGED = [((), (5,)), ((5,), ()), ((), ()), ((), (9,)), ((), ())]


def _steps_until_the_budget_is_spent(rank: int, world_size: int) -> tuple[int, list[int], dict[str, str]]:
    """Steps this rank agreed to, the damaged samples it knows of, and the error that stopped it."""
    from pipeline import dist
    from pipeline.engine.agreement import agree
    from pipeline.engine.state import TrainState
    from pipeline.stages.base import Normaliser
    from shards.errors import DataError

    training: Any = SimpleNamespace(
        recipe=SimpleNamespace(name="a-run", data=SimpleNamespace(max_bad_samples=1)), state=TrainState(),
        ranks=dist.Ranks(rank, rank, world_size), device=torch.device("cpu"), stop=SimpleNamespace(requested=False),
    )  # fmt: skip
    for step, damaged in enumerate(DAMAGED):
        bad = [BadSample(sample, "train-000000.tar", f"clip{sample}", "torn", 77) for sample in damaged[rank]]
        batch = StepBatch(
            [{"valid_tokens": 3, "samples": 1, "maxima": {"words": size}} for size in (2, 7 + rank)],
            Cursor(),
            bad,
            0.0,
            2,
        )
        try:
            agreed = agree(training, batch, [rank, 5])
        except DataError as error:
            return step, training.state.bad_samples, {"what": error.what, "where": error.where, "fix": error.fix}
        assert agreed.normaliser == Normaliser(12, 2, {"words": 8}) and agreed.votes == [1, 10] and not agreed.stop
    raise AssertionError("the budget was never spent")


def _unequal_micro_batches(rank: int, world_size: int) -> str:
    from pipeline import dist
    from pipeline.engine.agreement import agree
    from pipeline.engine.state import TrainState
    from pipeline.errors import ClusterError

    training: Any = SimpleNamespace(
        recipe=SimpleNamespace(name="a-run"), state=TrainState(step=6), ranks=dist.Ranks(rank, rank, world_size),
        stop=SimpleNamespace(requested=False),
    )  # fmt: skip
    micro_batches = [{"valid_tokens": 3, "samples": 1, "maxima": {}}] * (2 + rank)
    with pytest.raises(ClusterError) as error:
        agree(training, StepBatch(micro_batches, Cursor(), [], 0.0, 2), [])
    return str(error.value)


def test_unequally_many_micro_batches_are_told_on_every_rank() -> None:
    for message in run_ranks(_unequal_micro_batches, 2):
        assert message.startswith("a-run: rank 1 has 3 micro-batches in step 7, rank 0 has 2; every rank must have as")
        assert "Start all ranks with the same recipe" in message


def test_a_budget_exceeded_on_one_rank_stops_all_ranks_at_the_same_step() -> None:
    for step, known, error in run_ranks(_steps_until_the_budget_is_spent, 2):
        assert step == 3 and known == [5, 9]
        assert error["what"] == "2 damaged samples, more than data.max_bad_samples=1" and error["where"] == "a-run"
        assert "slt shards lint" in error["fix"]
