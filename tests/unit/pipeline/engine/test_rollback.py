"""Back to the last good checkpoint: which one, what stays, and when there is no way back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import dist
from pipeline.config.load import load_recipe
from pipeline.engine import checkpoint, rollback
from pipeline.engine.phases import Phases
from pipeline.engine.rollback import roll_back
from pipeline.engine.state import TrainState
from pipeline.errors import DivergedError

REASON = "gradients were not finite in 3 consecutive steps up to step 9"


def training(run_dir: Path, *sets: str, **state: Any) -> Any:
    recipe = load_recipe("demo_contrastive", [f"run_dir={run_dir}", *sets])
    return SimpleNamespace(
        recipe=recipe, run_dir=run_dir, state=TrainState(step=9, **state), engine=None, phases=Phases(),
        ranks=dist.Ranks(0, 0, 1),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sets", "rollbacks", "why"),
    [
        (["train.health.max_rollbacks=0"], 0, "The run is not rolled back: train.health.max_rollbacks is 0"),
        ([], 2, "The run has been rolled back 2 times, as often as train.health.max_rollbacks allows"),
        ([], 0, "There is no checkpoint in RUN to roll back to, saved while steps were applied; set"
                " train.checkpoint.every_steps or every_minutes"),
    ],
)  # fmt: skip
def test_a_run_without_a_way_back_has_diverged(sets: list[str], rollbacks: int, why: str, tmp_path: Path) -> None:
    run = training(tmp_path, *sets, rollbacks=rollbacks)
    with pytest.raises(DivergedError) as error:
        roll_back(run, REASON)
    assert error.value.exit_code == 5
    assert str(error.value) == (
        f"{run.recipe.name}: {REASON}; lower train.optimizer.lr, lengthen warmup_steps, or check the data. "
        + why.replace("RUN", str(tmp_path))
    )


def saved(path: Path, state: TrainState) -> Any:
    return SimpleNamespace(path=path, step=state.step, state=lambda: state)


def test_the_newest_good_checkpoint_counts_and_later_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not one that is damaged, of another format, or of weights that no step can be taken from."""
    states = {
        2: TrainState(step=2, data={"consumed": 16}, best={"step": 2}),
        4: TrainState(step=4, data={"consumed": 32}, best={"step": 4}, running_means={"loss": [1.0, 4.0]}, rollbacks=0),
        6: TrainState(step=6),
        8: TrainState(step=8, skipped_steps=2),
        9: TrainState(step=9),
    }
    folders = {step: tmp_path / "checkpoints" / f"step-{step:06d}" for step in states}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "COMPLETE").touch()
    by_folder = {folders[step]: saved(folders[step], state) for step, state in states.items()}
    loaded: list[Any] = []
    monkeypatch.setattr(rollback, "damage", lambda folder: ["flipped"] if folder == folders[6] else [])
    monkeypatch.setattr(rollback, "open_checkpoint", by_folder.__getitem__)
    monkeypatch.setattr(checkpoint, "is_foreign", lambda folder: folder == folders[9])
    monkeypatch.setattr(rollback, "load", lambda engine, target: loaded.append(target.step) or states[target.step])
    run = training(
        tmp_path, data={"consumed": 72}, skipped_steps=3, skipped_total=5, tokens_seen=7, rollbacks=1,
        best={"step": 8}, running_means={"loss": [9.0, 9.0]},
    )  # fmt: skip
    roll_back(run, REASON)
    assert loaded == [4]
    assert run.state == TrainState(
        step=4, data={"consumed": 72}, best={"step": 4}, running_means={"loss": [1.0, 4.0]}, rollbacks=2,
        undone_steps=5, skipped_total=5, tokens_seen=7,
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == [
        "step-000002",
        "step-000004",
        "step-000009",
    ]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-000004"
    assert f"ROLLING BACK 5 steps to {folders[4]}, and on with the samples that follow (2 of at most 2" in caplog.text
    assert f"checkpoint {folders[6]} is damaged" in caplog.text


@pytest.mark.parametrize(("trouble_after", "back_at"), [(None, 8), (8, 8), (7, 4), (2, 2), (1, 8)])
def test_a_checkpoint_from_amid_the_trouble_is_the_last_choice(
    trouble_after: int | None, back_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss is known once per row of metrics, and a checkpoint may have been saved in between."""
    states = {folder: TrainState(step=step) for step in (2, 4, 8) for folder in [tmp_path / f"step-{step:06d}"]}
    monkeypatch.setattr(rollback, "own_folders", lambda run_dir: list(states))
    monkeypatch.setattr(rollback, "damage", lambda folder: [])
    monkeypatch.setattr(rollback, "open_checkpoint", lambda folder: saved(folder, states[folder]))
    monkeypatch.setattr(rollback, "load", lambda engine, target: states[target.path])
    monkeypatch.setattr(rollback, "remove", lambda folder: None)
    run = training(tmp_path)
    roll_back(run, REASON, trouble_after)
    assert run.state.step == back_at
