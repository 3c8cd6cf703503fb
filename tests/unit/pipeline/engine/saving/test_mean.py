"""The mean of the last checkpoints: its numbers, what it keeps of the newest, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from launch.slt import app
from pipeline.engine.checkpoint import complete_folders, list_checkpoints, open_checkpoint
from pipeline.engine.saving import mean
from pipeline.engine.saving.mean import mean_of_last
from pipeline.engine.zero_shards import ZeroShards
from pipeline.errors import CheckpointError, DamagedCheckpointError
from pipeline.export.card import run_metrics
from pipeline.export.hf import export
from tests.unit.pipeline.export.runs import EXPORT_PLAN, finished_run, recipe_of

STEPS = (1, 2, 3, 10)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Four checkpoints without ZeRO; one tied weight, a buffer."""
    for step in STEPS:
        save(tmp_path, step, torch.full((2, 3), float(step)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "eval/loss": 1.0}\n')
    return tmp_path


def save(run_dir: Path, step: int, weight: torch.Tensor) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:06d}" / "deepspeed"
    folder.mkdir(parents=True)
    state = {
        "module": {"embed": weight, "head": weight, "scale": torch.tensor([float(step)])}, "buffer_names": ["scale"],
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}, "dp_world_size": 2,
        "ds_version": "0", "global_steps": step, "global_samples": step, "skipped_steps": 0,
    }  # fmt: skip
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    plan = {**EXPORT_PLAN, "tied": ["head"]}
    finished_run(run_dir, recipe_of("continued_pretraining"), step, plan=plan)


def test_the_mean_is_exported_like_any_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    out = mean_of_last(run_dir, 3)
    assert out == run_dir / "checkpoints" / "mean-000002-000010"
    shards = ZeroShards.open(out / "deepspeed")
    assert shards.tensor("embed").tolist() == [[5.0] * 3] * 2 and shards.shared == {"head": "embed"}
    assert shards.buffers()["scale"].tolist() == [10.0], "of the newest"
    export(out, tmp_path / "export", check=False)
    found = load_file(tmp_path / "export" / "model.safetensors")
    assert {name: value.flatten()[0].item() for name, value in found.items()} == {"embed": 5.0, "scale": 10.0}
    made = open_checkpoint(out)
    assert made.mean_of == ["step-000002", "step-000003", "step-000010"] and made.step == 10
    assert run_metrics(run_dir, made) == {} and run_metrics(run_dir, list_checkpoints(run_dir)[-1])
    assert len(complete_folders(run_dir)) == 4, "no run resumes from it"
    with pytest.raises(CheckpointError, match=r"is a mean of checkpoints, with which no live model.*--no-verify"):
        export(out, tmp_path / "again")


def test_where_a_mean_cannot_be(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="has 4 complete checkpoints, a mean needs at least 2 and --last asks"):
        mean_of_last(run_dir, 5)
    with pytest.raises(CheckpointError, match="--last asks for 1"):
        mean_of_last(run_dir, 1)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out exists; remove it, or name a new folder with --out"):
        mean_of_last(run_dir, 2, tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mean.torch, "save", full)
    with pytest.raises(CheckpointError, match=r"new could not be written: .*No space.*; free space, or name another"):
        mean_of_last(run_dir, 2, tmp_path / "new")
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]


def test_checkpoints_that_do_not_belong_together(run_dir: Path) -> None:
    save(run_dir, 11, torch.zeros(4, 3))
    with pytest.raises(CheckpointError, match="hold other parameters; average one run's own"):
        mean_of_last(run_dir, 2)
    shutil.rmtree(run_dir / "checkpoints" / "step-000011")
    (run_dir / "checkpoints" / "step-000010" / "hf" / "config.json").write_text("{}")
    with pytest.raises(DamagedCheckpointError, match=r"step-000010 is damaged:\n.*config.json has 2 bytes"):
        mean_of_last(run_dir, 2)


def test_the_command_names_the_folder(run_dir: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["ckpt", "average", str(run_dir), "--last", "2", "--out", str(tmp_path / "mean")])
    assert result.exit_code == 0 and result.output.strip() == str(tmp_path / "mean")
    assert ZeroShards.open(tmp_path / "mean" / "deepspeed").tensor("embed").flatten()[0] == 6.5
