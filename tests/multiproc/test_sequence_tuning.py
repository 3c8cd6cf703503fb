"""Sequence-level tuning on real DeepSpeed: the same steps for any number of ranks, bit-equal after a resume, and no
rank that waits for another under ZeRO-3, whose ranks sample texts of unequal lengths."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from pipeline.evaluate.run import EvaluateOptions, evaluate_export
from pipeline.export.hf import export
from pipeline.inference.generate import GenerationOptions
from pipeline.inference.load import load_export
from tests.jobs import World, rows, run_job
from tests.multiproc.test_training import TO_ROUNDING, newest, weights

pytestmark = pytest.mark.multiproc

STAGE = "sequence_tuning"
SETTINGS = {
    "train__steps": 4, "train__checkpoint__every_steps": 2, "train__checkpoint__keep": 5,
    "sequence_tuning__samples": 3, "connector__max_new_tokens": 12,
}  # fmt: skip
OBJECTIVES = {
    "minimum_risk": {"sequence_tuning__objective": "minimum_risk", "sequence_tuning__sharpness": 0.5},
    "grpo": {"sequence_tuning__cross_entropy_weight": 0.5, "sequence_tuning__kl_weight": 0.1},
}
ZERO_3 = {"deepspeed__overrides": "{zero_optimization: {stage: 3}}"}

Runs = Callable[[str], Path]


@pytest.fixture(scope="module")
def start(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A few steps of stage 3, which the runs go on from."""
    folder = tmp_path_factory.mktemp("stage_3")
    run_job("connector", world.sets("connector", folder / "run", 1, train__steps=3), 1)
    export(folder / "run", folder / "export")
    return {**SETTINGS, "model__init_from__connector": folder / "export"}


@pytest.fixture(scope="module")
def two(world: World, start: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Four uninterrupted steps of an objective on two ranks with two micro-batches each, by ZeRO-3."""

    @cache
    def run(objective: str) -> Path:
        run_dir = tmp_path_factory.mktemp("two") / objective
        run_job(STAGE, world.sets(STAGE, run_dir, 2, **start, **OBJECTIVES[objective], **ZERO_3), 2)
        return run_dir

    return run


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_big_batch_is_the_oracle(
    objective: str, world: World, start: dict[str, object], two: Runs, tmp_path: Path
) -> None:
    """One rank with one micro-batch and ZeRO stage 2 takes the steps of two ranks with two and ZeRO-3."""
    big = {**start, **OBJECTIVES[objective], "train__micro_batch": 8}
    run_job(STAGE, world.sets(STAGE, tmp_path / "one", 1, **big), 1)
    assert len(rows(tmp_path / "one")) == 4
    for name in ("train/loss", "train/reward", "train/candidate_tokens", "train/distinct_candidates"):
        expected = pytest.approx(rows(two(objective), name), rel=TO_ROUNDING, abs=1e-5)
        assert rows(tmp_path / "one", name) == expected, name
    norms = [rows(run_dir, "train/grad_norm") for run_dir in (tmp_path / "one", two(objective))]
    assert norms[0] == pytest.approx(norms[1], rel=10 * TO_ROUNDING, abs=1e-6)
    assert min(norms[0].values()) > 0
    assert newest(tmp_path / "one").state().data == newest(two(objective)).state().data


def test_a_resumed_run_is_bit_equal(world: World, start: dict[str, object], two: Runs, tmp_path: Path) -> None:
    """Also what it is held near to is the start of the run, not of the attempt."""
    run_dir = tmp_path / "resumed"
    shutil.copytree(two("grpo"), run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    output = run_job(STAGE, world.sets(STAGE, run_dir, 2, **start, **OBJECTIVES["grpo"], **ZERO_3), 2)
    assert "step-000002 at step 2" in output
    assert rows(run_dir, "train/divergence")[1] == pytest.approx(0, abs=1e-6)
    for name in ("train/loss", "train/reward", "train/candidate_tokens", "train/divergence"):
        assert rows(run_dir, name) == rows(two("grpo"), name)
    assert weights(run_dir) == weights(two("grpo"))


def test_an_export_translates_like_that_of_stage_3(world: World, two: Runs, tmp_path: Path) -> None:
    """`slt export` compares it with the live model; it opens, and is evaluated."""
    export(two("grpo"), tmp_path / "export")
    model, processor = load_export(tmp_path / "export")
    assert model.config.prompt == processor.options.prompt
    options = EvaluateOptions(split="dev", generation=GenerationOptions(num_beams=1, max_new_tokens=6), max_samples=2)
    report = evaluate_export(tmp_path / "export", [world.video], tmp_path / "scores", options)
    assert report is not None
    assert "sequence_tuning" in (tmp_path / "export" / "README.md").read_text()
