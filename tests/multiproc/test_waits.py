"""At most one wait for the device per optimizer step, in every stage and on real DeepSpeed, by the stand-in for CUDA.

What the stand-in counts: `benchmarks.gpu.waits`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu.waits import STAND_IN, Lines, by_function, counted
from pipeline import dist
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.training import Training
from tests.jobs import World
from tests.ranks import run_ranks

pytestmark = pytest.mark.multiproc

STAGES = ("continued_pretraining", "contrastive", "connector")
SETTINGS = {
    "train__steps": 4, "train__log_every_steps": 4, "train__precision": "bf16", "data__eval": "[]",
}  # fmt: skip
ZERO = "{{zero_optimization: {{stage: {0}}}}}"
UNTIL = 2
"""Steps that are not counted: ZeRO-3 learns the order of layers in them."""
ONCE = Lines({"pipeline/engine/gate.py refuses": 1})
"""Whether to skip the step."""
ROW = Lines({"pipeline/engine/observers/log.py _fetched": 1})


class Count(Observer):
    """The last of the observers: counts from the end of a step to the end of the next, its copy to the device included;
    not the first steps."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.steps: list[Lines] = []
        self.counting = contextlib.ExitStack()

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> dict[str, float]:
        self.counting.close()
        if self.training.state.step >= UNTIL and not step.last:
            self.steps.append(self.counting.enter_context(counted(self.training.engine.engine, STAND_IN)))
        return {}


def count_steps(rank: int, world_size: int, jobs: list[tuple[str, list[str]]]) -> list[list[dict[str, int]]]:
    """Waits by function of every counted step of every run, in one process group."""
    dist.init()
    return [count_steps_of(stage, sets, world_size) for stage, sets in jobs]


def count_steps_of(stage: str, sets: list[str], world_size: int) -> list[dict[str, int]]:
    from pipeline.config.load import load_recipe
    from pipeline.config.resolve import resolve
    from pipeline.engine.observers.registry import OBSERVERS
    from pipeline.engine.phases import Phases
    from pipeline.engine.prepare import prepare
    from pipeline.engine.signals import StopFlag
    from pipeline.engine.trainer import Trainer
    from pipeline.stages.registry import stage_class

    resolved = resolve(load_recipe(f"demo_{stage}", sets), world_size)
    Path(resolved.recipe.run_dir).mkdir(parents=True, exist_ok=True)
    training = prepare(resolved, stage_class(stage), dist.ranks_from_environment(), STAND_IN, StopFlag(), Phases())
    count = Count(training)
    Trainer(training, [*(kind(training) for kind in OBSERVERS if kind.enabled(training.recipe)), count], []).fit()
    training.engine.destroy()
    return [dict(by_function(lines)) for lines in count.steps]


@pytest.fixture(scope="module")
def counts(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[Lines]]:
    """Waits of every step of a run on two ranks with two micro-batches each, by stage and ZeRO stage."""
    folder = tmp_path_factory.mktemp("waits")
    runs = [(stage, zero) for stage in STAGES for zero in (1, 3)]
    jobs = [
        (stage, world.sets(stage, folder / f"{stage}-{zero}", 2, **SETTINGS, deepspeed__overrides=ZERO.format(zero)))
        for stage, zero in runs
    ]
    zeroth, first = run_ranks(count_steps, 2, jobs, timeout=400)
    return {
        run: [Lines(most) | Lines(other) for most, other in zip(steps, others, strict=True)]
        for run, steps, others in zip(runs, zeroth, first, strict=True)
    }


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_waits_once(stage: str, zero: int, counts: dict[tuple[str, int], list[Lines]]) -> None:
    """And once more to write a row."""
    plain, logged = counts[stage, zero]
    assert plain == ONCE
    assert logged == ONCE + ROW


CASES: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], object], int]] = {
    "a value": (lambda there, here: there.sum().item(), 1),
    "a condition": (lambda there, here: bool((there * 2 > 0).any()), 1),
    "a list": (lambda there, here: there.tolist(), 1),
    "a copy to the host, read twice": (lambda there, here: (copy := there.cpu()).tolist() + copy.numpy().tolist(), 1),
    "a copy to the host by name": (lambda there, here: there.to("cpu"), 1),
    "a boolean index": (lambda there, here: there[there > 0], 1),
    "indices of the host": (lambda there, here: there[here.long()], 1),
    "a constant made on the device by copying": (lambda there, here: torch.tensor(1.0, device=STAND_IN), 1),
    "a choice between both sides": (lambda there, here: torch.where(there > 0, here.sum(), there), 1),
    "a copy to the device": (lambda there, here: here.to(there.device), 1),
    "lengths that are values": (lambda there, here: torch.repeat_interleave(there, (there > 0).long()), 1),
    "a copy to the device without waiting": (lambda there, here: here.to(STAND_IN, non_blocking=True) + there, 0),
    "what was copied, then read": (lambda there, here: here.to(STAND_IN, non_blocking=True).tolist(), 1),
    "numbers of the host": (lambda there, here: (here.sum().item(), here.tolist(), here[here > 0], bool(here[0])), 0),
    "lengths and a known size": (
        lambda there, here: torch.repeat_interleave(there, (there > 0).long(), output_size=2), 0,
    ),
    "constants made on the device": (lambda there, here: torch.zeros(3, device=there.device) + there + 1.0, 0),
    "indices of the device": (lambda there, here: there[torch.zeros(2, dtype=torch.long, device=there.device)], 0),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_counts_as_a_wait(case: str) -> None:
    """On CUDA these wait for the device, or do not."""
    function, waits = CASES[case]
    module = torch.nn.ParameterList([torch.arange(3.0)])
    here = torch.arange(3.0)
    with counted(SimpleNamespace(module=module, optimizer=None), STAND_IN) as lines:
        function(module[0].detach(), here)
    assert sum(lines.values()) == waits, lines
    assert not lines or list(by_function(lines)) == ["tests/multiproc/test_waits.py <lambda>"]
