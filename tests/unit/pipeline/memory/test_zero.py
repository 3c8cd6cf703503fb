"""Rules that real ranks are not compared with: offloading, and defaults of DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.memory.lines import BACKWARD, STEP, Line, peak
from pipeline.memory.zero import Weight, ZeroSettings, state_lines

WEIGHTS = [Weight("llm", 1000, 2, True), Weight("llm", 10, 1, True), Weight("visual", 500, 2, False)]


def _lines(ranks: int = 2, bf16: bool = True, data_types: Any = None, **zero: Any) -> dict[str, int]:
    config = {"zero_optimization": zero, "bf16": {"enabled": bf16}, "data_types": data_types}
    return {line.item: line.bytes for line in state_lines(WEIGHTS, ZeroSettings.of(config, ranks))}


def test_the_defaults_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    ours = ZeroSettings.of({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, 2)
    theirs = DeepSpeedZeroConfig(stage=3)
    assert (ours.bucket, ours.prefetch) == (theirs.reduce_bucket_size, theirs.prefetch_bucket_size)
    assert (ours.persistent, ours.sub_group) == (theirs.param_persistence_threshold, theirs.sub_group_size)
    assert (ours.max_live, ours.max_reuse) == (theirs.max_live_parameters, theirs.max_reuse_distance)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_in_host_memory_takes_nothing_on_the_device(stage: int) -> None:
    there = _lines(stage=stage)
    assert {"fp32 master weights", "AdamW moments", "gradients of the step"} <= set(there)
    gone = _lines(stage=stage, offload_optimizer={"device": "cpu"})
    assert not {"fp32 master weights", "AdamW moments", "gradients of the step"} & set(gone)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_mean_of_the_weights_takes_as_much_as_one_moment(stage: int) -> None:
    settings = ZeroSettings.of({"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}, 2)
    plain, more = (state_lines(WEIGHTS, settings, averages) for averages in (False, True))
    (mean,) = more[len(plain) :]
    (moments,) = (line for line in plain if line.item == "AdamW moments")
    assert more[:-1] == plain and mean.item == "mean of the weights" and 2 * mean.bytes == moments.bytes
    assert mean.fields == ("train.averaging.kind",)


def test_weights_in_host_memory_are_only_gathered() -> None:
    gone = _lines(stage=3, stage3_param_persistence_threshold=0, offload_param={"device": "cpu"})
    assert "weights, trained" not in gone and gone["weights gathered"] == 2 * 1510


def test_frozen_weights_are_replicated_below_stage_3() -> None:
    assert _lines(stage=1)["weights, frozen"] == 1000 and _lines(stage=3)["weights, frozen"] == 500


def test_gradients_accumulated_in_fp32() -> None:
    """Stage 1 then runs DeepSpeed's bf16 optimizer, whose gradients are whole; stage 2 keeps its part."""
    fp32 = {"grad_accum_dtype": "fp32"}
    assert _lines(stage=1, data_types=fp32)["fp32 gradients"] == 4 * (1000 + 12)
    assert _lines(stage=2, data_types=fp32)["gradients"] == 4 * (500 + 6)


def test_the_peak_is_that_of_one_phase() -> None:
    lines = [Line("a", 5, ""), Line("b", 3, "", frozenset({BACKWARD})), Line("c", 4, "", frozenset({STEP}))]
    assert peak(lines) == (STEP, 9)
