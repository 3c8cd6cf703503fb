"""One checkpoint on its way beside the steps: what waits for what, and what is left when it fails."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine import checkpoint as checkpoints
from pipeline.engine.saving.save import Saver
from pipeline.errors import CheckpointError, StorageError
from tests.unit.pipeline.engine.test_write_errors import Engine, OneStage, saver_of


class SlowEngine(Engine):
    """Writes once it may."""

    def __init__(self) -> None:
        super().__init__(4)
        self.may = threading.Event()

    def save(self, state_dict: Any, path: str) -> None:
        assert self.may.wait(20)
        super().save(state_dict, path)


def steps(run_dir: Path) -> list[int]:
    return [found.step for found in checkpoints.list_checkpoints(run_dir)]


def to_the_end(saver: Saver) -> dict[str, float]:
    """As the observer does, at every step border at which all ranks are done."""
    while True:
        assert saver._pending is not None
        saver._pending.work.exception(20)
        assert saver.done_here
        if metrics := saver.advance():
            return metrics


def test_training_goes_on_while_it_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pipeline")
    engine = SlowEngine()
    saver = saver_of(tmp_path, engine, OneStage(), 7)
    assert saver.begin(best=True) == {} and saver.pending and not saver.done_here
    before = engine.module.weight.detach().clone()
    engine.module.weight.data.zero_()
    saver.training.state.step = 8
    assert steps(tmp_path) == []
    engine.may.set()
    metrics = to_the_end(saver)
    assert not saver.pending and steps(tmp_path) == [7] and checkpoints.best_name(tmp_path) == "step-000007"
    (found,) = checkpoints.list_checkpoints(tmp_path)
    assert found.state().step == 7 and checkpoints.verify(found) == []
    stored = torch.load(found.path / "deepspeed" / "mp_rank_00_model_states.pt")["weight"]
    assert torch.equal(stored, before) and not torch.equal(stored, engine.module.weight)
    assert set(metrics) == {"checkpoint/stall_seconds", "checkpoint/write_seconds"}
    assert re.search(r"checkpoint step 7 complete: stalled \d+\.\d\d s, written in \d+\.\d s", caplog.text)


def test_the_next_one_waits_for_the_one_before_and_the_wait_counts(tmp_path: Path) -> None:
    engine = SlowEngine()
    saver = saver_of(tmp_path, engine, OneStage(), 1)
    saver.begin(best=False)
    threading.Timer(0.3, engine.may.set).start()
    saver.training.state.step = 2
    metrics = saver.begin(best=False)
    assert metrics["checkpoint/stall_seconds"] > 0.25 and steps(tmp_path) == [1]
    assert saver.finish()["checkpoint/stall_seconds"] < 0.25 and steps(tmp_path) == [1, 2]
    assert saver.finish() == {}


def test_files_that_never_change_are_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    class Stage(OneStage):
        def write_export_files(self, folder: Path) -> Any:
            made.append(folder)
            return super().write_export_files(folder)

    saver = saver_of(tmp_path, Engine(4), Stage(), 1)
    for step in (1, 2):
        saver.training.state.step = step
        saver.begin(best=False)
        saver.finish()
    assert len(made) == 1 and not made[0].exists()
    texts = [(found.path / "hf" / "config.json").read_text() for found in checkpoints.list_checkpoints(tmp_path)]
    assert texts == ["{}", "{}"]


def test_every_so_many_steps_one_stays(tmp_path: Path) -> None:
    saver = saver_of(
        tmp_path, Engine(4), OneStage(), 0, "train.checkpoint.keep=1", "train.checkpoint.keep_every_steps=4"
    )
    for step in range(2, 12, 2):
        saver.training.state.step = step
        saver.begin(best=False)
        saver.finish()
    assert steps(tmp_path) == [4, 8, 10]


def test_a_failed_write_is_told_when_all_are_done(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, Engine(4, OSError(28, "No space left on device")), OneStage(), 3)
    saver.begin(best=False)
    with pytest.raises(CheckpointError, match=r"step-000003 could not be written: .*while writing the ZeRO shards"):
        to_the_end(saver)
    assert not saver.pending and list((tmp_path / "checkpoints").iterdir()) == []


def test_small_files_that_do_not_fit_are_told_like_any_other(tmp_path: Path) -> None:
    class Stage(OneStage):
        def write_export_files(self, folder: Path) -> Any:
            raise OSError(28, "No space left on device")

    saver = saver_of(tmp_path, Engine(4), Stage(), 3)
    saver.begin(best=False)
    with pytest.raises(CheckpointError, match="while writing the export files: No space left on device"):
        saver.finish()


def test_nothing_is_on_its_way(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, Engine(4), OneStage(), 3)
    assert not saver.pending and not saver.done_here
    with pytest.raises(AssertionError, match="no checkpoint is on its way"):
        saver.advance()


def test_state_that_deepspeed_keeps_on_disks_is_a_part_too(tmp_path: Path) -> None:
    """Offloaded to NVMe, it is copied past the checkpoint engine."""

    class Offloading(Engine):
        def save_checkpoint(self, folder: str, tag: str, **options: Any) -> None:
            super().save_checkpoint(folder, tag, **options)
            for rank in ("rank00", "rank01"):
                swapped = Path(folder) / tag / "offloaded_tensors" / rank / "moments.swp"
                swapped.parent.mkdir(parents=True)
                swapped.write_bytes(b"numbers")

    saver = saver_of(tmp_path, Offloading(4), OneStage(), 3)
    saver.begin(best=False)
    saver.finish()
    (found,) = checkpoints.list_checkpoints(tmp_path)
    names = [name for name in found.manifest["parts"] if "offloaded" in name]
    assert names == ["deepspeed/offloaded_tensors/rank00/moments.swp"], "the other one is another rank's"


def test_state_on_disks_that_does_not_fit_is_named(tmp_path: Path) -> None:
    class Offloading(Engine):
        def save_checkpoint(self, folder: str, tag: str, **options: Any) -> None:
            raise OSError(28, "No space left on device", f"{folder}/{tag}/offloaded_tensors/rank00/moments.swp")

    saver = saver_of(tmp_path, Offloading(4), OneStage(), 3)
    with pytest.raises(
        StorageError, match=r"moments\.swp could not be written: No space left on device; free space or"
    ):
        saver.begin(best=False)


def test_a_foreign_checkpoint_of_the_same_step_is_moved_not_replaced(tmp_path: Path) -> None:
    from tests.unit.pipeline.engine.test_checkpoint import foreign, make

    foreign(make(tmp_path, 3))
    saver = saver_of(tmp_path, Engine(4), OneStage(), 3)
    saver.begin(best=False)
    saver.finish()
    assert steps(tmp_path) == [3]
    assert (tmp_path / "checkpoints" / "foreign-step-000003" / "part.bin").read_bytes() == b"weights"


def test_a_checkpoint_amid_training_runs_no_forward_pass(tmp_path: Path) -> None:
    class Stage(OneStage):
        def probe(self, model: object) -> dict[str, torch.Tensor]:
            raise AssertionError("costs a forward pass")

    saver = saver_of(tmp_path, Engine(4), Stage(), 3)
    saver.begin(best=False, outputs=False)
    saver.finish()
    (found,) = checkpoints.list_checkpoints(tmp_path)
    assert "probe.safetensors" not in found.manifest["parts"]
    with pytest.raises(CheckpointError, match=r"step-000003 was saved amid training, without outputs of the live mod"):
        found.probe()
