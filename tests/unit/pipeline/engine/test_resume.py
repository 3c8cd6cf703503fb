"""Which runs may continue a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config.load import load_recipe
from pipeline.config.resolve import ResolvedRecipe, resolve
from pipeline.engine import resume
from pipeline.engine.checkpoint import best_name, complete_folders, open_checkpoint
from pipeline.engine.saving.retention import mark_best, prune
from pipeline.engine.state import TrainState
from pipeline.errors import CheckpointError, DamagedCheckpointError
from tests.unit.pipeline.engine.test_checkpoint import make


def resolved(run_dir: Path, *sets: str) -> ResolvedRecipe:
    recipe = load_recipe("demo_contrastive", [f"run_dir={run_dir}", *sets])
    return resolve(recipe, 1)


def saved(run_dir: Path, *sets: str, step: int = 5) -> Path:
    folder = make(run_dir, step)
    (folder / "recipe.resolved.yaml").write_text(resolved(run_dir, *sets).to_yaml())
    return folder


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert resume.find_resume(tmp_path, resolved(tmp_path)) is None
    with pytest.raises(CheckpointError, match=r"`require` but .* holds no complete checkpoint"):
        resume.find_resume(tmp_path, resolved(tmp_path, "train.checkpoint.resume=require"))


def test_same_experiment_continues_with_other_settings_of_the_machine(tmp_path: Path) -> None:
    saved(tmp_path)
    found = resume.find_resume(
        tmp_path, resolved(tmp_path, "data.workers=0", "train.log_every_steps=1", "train.micro_batch=4")
    )
    assert found is not None and found.step == 5


def test_a_run_that_lacked_memory_continues_in_smaller_pieces(tmp_path: Path) -> None:
    """What the out-of-memory message proposes must not make another experiment of the run."""
    saved(tmp_path)
    sets = (
        "contrastive.tile_mib=1", "model.visual.backbone.frames_per_pass=8", "model.gradient_checkpointing=true",
        "continued_pretraining.loss_chunk_tokens=64",
    )  # fmt: skip
    assert resume.find_resume(tmp_path, resolved(tmp_path, *sets)) is not None


def test_zero_may_shard_in_another_way(tmp_path: Path) -> None:
    saved(tmp_path, "deepspeed.base=zero2", "deepspeed.overrides={}")
    for stage in (1, 3):
        sets = (f"deepspeed.base=zero{stage}", "deepspeed.overrides={}")
        assert resume.find_resume(tmp_path, resolved(tmp_path, *sets)) is not None


def test_never_refuses_to_write_over_a_run(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"`never` but .*step-000005 exists"):
        resume.find_resume(tmp_path, resolved(tmp_path, "train.checkpoint.resume=never"))


def test_another_experiment_is_refused_by_field(tmp_path: Path) -> None:
    saved(tmp_path)
    changed = ["train.optimizer.lr=0.5", "contrastive.embed=64"]
    with pytest.raises(CheckpointError) as error:
        resume.find_resume(tmp_path, resolved(tmp_path, *changed))
    assert "contrastive.embed: 128 -> 64" in str(error.value)
    assert "train.optimizer.lr" in str(error.value)


def test_a_damaged_newest_checkpoint_is_passed_over_and_set_aside(tmp_path: Path) -> None:
    saved(tmp_path)
    damaged = saved(tmp_path, step=7)
    (damaged / "part.bin").write_bytes(b"weighTs")
    (damaged / "recipe.resolved.yaml").write_bytes(b"\xff")
    found = resume.find_resume(tmp_path, resolved(tmp_path))
    assert found is not None and found.step == 5
    assert sorted(p.name for p in damaged.parent.iterdir()) == ["damaged-step-000007", "step-000005"]


def test_the_best_checkpoint_of_a_resumed_run_is_one_of_its_own_history(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`best` named a checkpoint of steps that are taken anew; pruning by it would remove the run's own."""
    three, _, seven = (saved(tmp_path, step=step) for step in (3, 5, 7))
    mark_best(tmp_path, seven)
    (seven / "part.bin").unlink()
    found = resume.find_resume(tmp_path, resolved(tmp_path))
    assert found is not None and found.step == 5
    caplog.clear()
    own = TrainState(step=5, best={"metric": "eval/loss", "value": 1.0, "step": 3})
    resume.restore_best(tmp_path, own)
    assert best_name(tmp_path) == three.name and not caplog.records
    prune(tmp_path, keep=1)
    assert [path.name for path in complete_folders(tmp_path)] == ["step-000003", "step-000005"]
    (three / "COMPLETE").unlink()
    resume.restore_best(tmp_path, own)
    assert best_name(tmp_path) == "" and f"{three}, no longer exists" in caplog.text
    resume.restore_best(tmp_path, TrainState(step=5))
    assert len(caplog.records) == 1


def test_a_damaged_newest_checkpoint_stops_a_run_that_asks_for_it(tmp_path: Path) -> None:
    saved(tmp_path)
    damaged = saved(tmp_path, step=7)
    (damaged / "part.bin").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"part\.bin is missing\n.*step-000005 is intact, but"):
        resume.find_resume(tmp_path, resolved(tmp_path, "train.checkpoint.damaged=stop"))
    assert damaged.is_dir()


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [({"a": 1}, {"a": 1}, []), ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b: 1 -> 2"]), ({}, {"x": 1}, ["x: None -> 1"])],
)
def test_differences(before: Any, after: Any, found: list[str]) -> None:
    assert resume.differences(before, after) == found


def test_a_run_goes_on_only_beside_the_frozen_weights_it_has_loaded_so_far(tmp_path: Path) -> None:
    """They are in no checkpoint: a folder that another program wrote to meanwhile would change the model unseen."""
    asked: list[Any] = []

    def stage(change: str) -> Any:
        return SimpleNamespace(changed_source=lambda recorded: asked.append(recorded) or change)

    folder = saved(tmp_path)
    (folder / "hf").mkdir()
    (folder / "hf" / "export.json").write_text(json.dumps({"sources": {"llm": {"model.safetensors": {"size": 1}}}}))
    resume.check_frozen_sources(open_checkpoint(folder), stage(""))
    change = "llm/model.safetensors has changed since the run that froze model.llm loaded it"
    with pytest.raises(CheckpointError, match=rf"{change}: the run of {folder} would go on with other frozen weights"):
        resume.check_frozen_sources(open_checkpoint(folder), stage(change))
    (folder / "hf" / "export.json").write_text("{}")  # of an earlier release
    resume.check_frozen_sources(open_checkpoint(folder), stage(""))
    assert asked == [{"llm": {"model.safetensors": {"size": 1}}}] * 2 + [{}]
