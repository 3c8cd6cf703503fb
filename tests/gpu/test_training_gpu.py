"""Every stage on CUDA under every ZeRO stage against the CPU; killed, resumed and exported under ZeRO-3; no step waits
for the device but where DeepSpeed decides whether to skip it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu import stages, steps
from benchmarks.gpu.rows import Probe, read
from benchmarks.loops import fit, make_training
from pipeline.engine.gate import Gate
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.training import Training

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """Behind the benchmark's section of all stages, whose exports later stages read."""
    folder = tmp_path_factory.mktemp("stages")
    made = Probe("stages", folder / "rows.jsonl", folder / "work", dry=False)
    stages.run(made)
    return made


def test_every_stage_trains_resumes_exports_and_generates(probe: Probe) -> None:
    """What the benchmark's section finds, asserted: each result is one row."""
    rows = read(probe.out)
    assert [row for row in rows if not row["ok"]] == []
    asked = {f"{stage} zero{zero} losses" for stage in stages.STAGES for zero in (1, 2, 3)}
    asked |= {f"{stage} zero3 {name}" for stage in stages.STAGES for name in ("killed, resumed", "export")}
    assert {row["name"] for row in rows} == asked | {"LLM greedy tokens equal the CPU's", "slt evaluate"}


class Strict(Observer):
    """From the agreement between ranks to the last observer a wait for the device is an error; not in the first steps,
    which allocate, and not in the last one, which writes a row."""

    def __init__(self, training: Training) -> None:
        super().__init__(training)
        self.steps: list[int] = []

    def vote(self) -> int:
        if 2 <= self.training.state.step < self.training.total_steps - 1:
            self.steps.append(self.training.state.step)
            torch.cuda.set_sync_debug_mode("error")
        return 0


class Lenient(Observer):
    """The last of the observers."""

    def on_step(self, step: FinishedStep, wishes: Wishes, votes: int) -> dict[str, float]:
        torch.cuda.set_sync_debug_mode("default")
        return {}


def allowed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and it may wait."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return call


def refused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but not inside a step; torch's mode does not see it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        assert torch.cuda.get_sync_debug_mode() != 2, "the host waits for the whole device"
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_step_waits_once(stage: str, zero: int, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gate, "refuses", allowed(Gate.refuses))
    monkeypatch.setattr(torch.cuda, "synchronize", refused(torch.cuda.synchronize))
    # ZeRO-3 waits for its stream of reductions behind every backward pass
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", allowed(torch.cuda.Stream.synchronize))
    try:
        training = make_training(f"demo_{stage}", steps.sets(probe, stage, zero), "cuda")
        strict = Strict(training)
        fit(training, [strict], [Lenient(training)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert strict.steps == list(range(2, steps.STEPS - 1)), "none of these steps waited"
