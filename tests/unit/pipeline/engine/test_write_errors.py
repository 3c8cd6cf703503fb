"""Checkpoints that cannot be written or read are one sentence, whatever library noticed first."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.load import load_recipe
from pipeline.config.resolve import resolve
from pipeline.engine import checkpoint as checkpoints
from pipeline.engine.durable import failed_writes_as_os_error
from pipeline.engine.saving import publish as publishing
from pipeline.engine.saving.retention import prune
from pipeline.engine.saving.save import Saver
from pipeline.engine.state import TrainState
from pipeline.errors import CheckpointError
from tests.unit.pipeline.disk import full_disk


class Engine:
    """Saves as DeepSpeed does, through its checkpoint engine; ``error`` is raised instead."""

    def __init__(self, numbers: int, error: Exception | None = None, zip_format: bool = True) -> None:
        self.module = torch.nn.Linear(1, numbers)
        self.error, self.zip_format = error, zip_format
        self.engine = self.checkpoint_engine = self
        self.forward = self.module
        self.options: dict[str, Any] = {}

    def save_checkpoint(self, folder: str, tag: str, **options: Any) -> None:
        self.options = options
        file = Path(folder) / tag / "mp_rank_00_model_states.pt"
        self.checkpoint_engine.makedirs(str(file.parent), exist_ok=True)
        self.checkpoint_engine.save(self.module.state_dict(), str(file))
        self._copy_recovery_script(folder)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        raise AssertionError("the writer makes folders")

    def save(self, state_dict: Any, path: str) -> None:
        if self.error is not None:
            raise self.error
        torch.save(state_dict, path, _use_new_zipfile_serialization=self.zip_format)

    def _copy_recovery_script(self, folder: str) -> None:
        (Path(folder) / "zero_to_fp32.py").write_text("pass")


class OneStage:
    """As much of a stage as saving needs."""

    def __init__(self, numbers: int = 4) -> None:
        self.numbers = numbers

    def probe(self, model: object) -> dict[str, torch.Tensor]:
        del model
        return {"logits": torch.zeros(self.numbers)}

    def write_export_files(self, folder: Path) -> Any:
        from pipeline.stages.base import ExportPlan

        (folder / "config.json").write_text("{}")
        return ExportPlan(prefix="", tied=[], frozen=[])


def saver_of(run_dir: Path, engine: Engine, stage: OneStage, step: int, *sets: str) -> Saver:
    resolved = resolve(load_recipe("demo_contrastive", [f"run_dir={run_dir}", "train.checkpoint.keep=2", *sets]), 1)
    training: Any = SimpleNamespace(
        recipe=resolved.recipe, resolved=resolved, run_dir=run_dir, engine=engine, stage=stage, state=TrainState(step)
    )
    return Saver(training)


def save(run_dir: Path, engine: Engine, stage: OneStage, step: int, *sets: str) -> Path:
    saver = saver_of(run_dir, engine, stage, step, *sets)
    saver.begin(best=False)
    saver.finish()
    return run_dir / "checkpoints" / f"step-{step:06d}"


BACKGROUND = pytest.mark.parametrize(
    "background", ["train.checkpoint.background=true", "train.checkpoint.background=false"]
)


@BACKGROUND
def test_save_writes_a_complete_checkpoint_and_keeps_frozen_weights_out(tmp_path: Path, background: str) -> None:
    engine = Engine(4)
    engine.module.bias.requires_grad_(False)
    path = save(tmp_path, engine, OneStage(), 3, background)
    found = checkpoints.open_checkpoint(path)
    assert found.step == 3 and found.state().step == 3 and checkpoints.verify(found) == []
    assert set(found.manifest["parts"]) == {
        "deepspeed/mp_rank_00_model_states.pt", "rng-rank-0.pt", "state.json", "recipe.resolved.yaml",
        "probe.safetensors", "hf/config.json", "hf/export.json", "zero_to_fp32.py",
    }  # fmt: skip
    assert engine.options["exclude_frozen_parameters"] is True and engine.options["save_latest"] is False
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000003"], "folders are the truth"
    assert torch.equal(found.probe()["logits"], torch.zeros(4))


@BACKGROUND
@pytest.mark.parametrize(
    ("engine", "stage", "part"),
    [
        (Engine(100_000), OneStage(), "the ZeRO shards"),
        (Engine(100_000, zip_format=False), OneStage(), "the ZeRO shards"),
        (Engine(4), OneStage(100_000), r"probe\.safetensors"),
    ],
    ids=["zip", "legacy", "safetensors"],
)
def test_a_full_disk_leaves_the_checkpoint_before_it_alone(
    tmp_path: Path, engine: Engine, stage: OneStage, part: str, background: str
) -> None:
    first = save(tmp_path, Engine(4), OneStage(), 1)
    message = (
        rf"checkpoint .*step-000002 could not be written: while writing {part}: .*"
        r"Earlier checkpoints are untouched; free space or change run_dir.*resumes from the last complete checkpoint"
    )
    with full_disk(), pytest.raises(CheckpointError, match=message):
        save(tmp_path, engine, stage, 2, background)
    assert [found.path for found in checkpoints.list_checkpoints(tmp_path)] == [first]
    assert checkpoints.verify(checkpoints.open_checkpoint(first)) == []
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000001"], "half-written left behind"
    again = save(tmp_path, Engine(4), OneStage(), 2)
    assert checkpoints.latest_checkpoint(tmp_path) == checkpoints.open_checkpoint(again)


@pytest.mark.parametrize(
    "text",
    [
        # as torch 2.13 words a full disk (zip format twice, legacy format) and a folder that is gone
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
        "basic_ios::clear: iostream error",
        "write(): fd 3 failed with No space left on device",
        "Parent directory /gone does not exist.",
    ],
)
def test_torchs_own_words_for_a_failed_write_become_an_os_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="while writing the ZeRO shards: ") as error:
        save(tmp_path, Engine(1, RuntimeError(text)), OneStage(), 2)
    assert text in str(error.value)


def test_the_last_small_files_may_not_fit_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COMPLETE, which is written last, before the folder gets its name."""
    first = save(tmp_path, Engine(4), OneStage(), 1)
    write = publishing.write_durably

    def full(path: Path, text: str) -> None:
        if path.name == "COMPLETE":
            raise OSError(28, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(publishing, "write_durably", full)
    with pytest.raises(CheckpointError, match=r"step-000002 could not be written: .*No space left.*COMPLETE"):
        save(tmp_path, Engine(4), OneStage(), 2)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == [first.name]


def test_a_step_that_is_saved_again_is_never_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the two renames leaves both checkpoints; the run that resumes publishes the newer one."""
    first = save(tmp_path, Engine(4), OneStage(), 1)
    manifest = (first / "manifest.json").read_bytes()
    replace = publishing.os.replace

    def crash(source: Path, target: Path) -> None:
        if target == first:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(publishing.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, Engine(5), OneStage(), 1)
    folder = tmp_path / "checkpoints"
    assert sorted(entry.name for entry in folder.iterdir()) == [".replaced-step-000001", ".tmp-step-000001"]
    assert (folder / ".replaced-step-000001" / "manifest.json").read_bytes() == manifest
    publishing.finish_interrupted(folder)
    assert checkpoints.verify(checkpoints.open_checkpoint(first)) == []
    assert (first / "manifest.json").read_bytes() != manifest, "the newer one"
    save(tmp_path, Engine(4), OneStage(), 2)
    prune(tmp_path, keep=2)
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-000001", "step-000002"]


def test_a_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    """tokenizers raises a bare Exception."""

    class Stage(OneStage):
        def write_export_files(self, folder: Path) -> Any:
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(
        CheckpointError, match=r"while writing the export files: No space left on device \(os error 28\)"
    ):
        save(tmp_path, Engine(4), Stage(), 2)


def test_saving_a_step_again_drops_its_converted_copy_and_a_stale_latest(tmp_path: Path) -> None:
    path = save(tmp_path, Engine(4), OneStage(), 3)
    copy = checkpoints.universal_folder(path)
    copy.mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-000001")
    save(tmp_path, Engine(4), OneStage(), 3)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


@BACKGROUND
def test_an_engines_own_bug_stays_what_it_is(tmp_path: Path, background: str) -> None:
    with pytest.raises(RuntimeError, match="profile of rewrite"):
        save(tmp_path, Engine(1, RuntimeError("profile of rewrite")), OneStage(), 2, background)


def test_an_error_with_a_name_keeps_it_and_one_without_gets_it() -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: '/disk/weights'"),
        failed_writes_as_os_error("weights"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/weights")
    with pytest.raises(OSError, match="while writing weights: No space left"), failed_writes_as_os_error("weights"):
        raise OSError(errno.ENOSPC, "No space left on device")
