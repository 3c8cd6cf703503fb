"""Checkpoints on disk: complete or absent, verified, never guessed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from pipeline.config.load import load_recipe
from pipeline.config.resolve import resolve
from pipeline.engine import checkpoint as checkpoints
from pipeline.engine.durable import write_durably
from pipeline.engine.elastic import renew_adam
from pipeline.engine.saving import retention
from pipeline.engine.state import TrainState, restore_rng, rng_state, seed_everything
from pipeline.errors import CheckpointError, DamagedCheckpointError, ForeignCheckpointError


def make(run_dir: Path, step: int, complete: bool = True, payload: bytes = b"weights") -> Path:
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "part.bin").write_bytes(payload)
    parts = {"part.bin": {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}}
    manifest = {"format_version": 1, "step": step, "world_size": 2, "zero_stage": 3, "parts": parts}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "state.json").write_text(json.dumps(TrainState(step=step).to_dict()))
    if complete:
        (folder / "COMPLETE").touch()
    return folder


def test_only_complete_checkpoints_exist(tmp_path: Path) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2)
    unfinished = make(tmp_path, 3, complete=False)
    assert [found.step for found in checkpoints.list_checkpoints(tmp_path)] == [1, 2]
    latest = checkpoints.latest_checkpoint(tmp_path)
    assert latest is not None and latest.step == 2 and latest.world_size == 2
    assert latest.state().step == 2
    with pytest.raises(CheckpointError, match=r"step-000003 is incomplete \(no COMPLETE file\)"):
        checkpoints.open_checkpoint(unfinished)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.open_checkpoint(tmp_path / "nothing")


def test_all_ranks_choose_from_the_list_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk may show a host the newest folder later than another; ranks that verify different ones wait for
    each other for ever."""
    older, newest = make(tmp_path, 1), make(tmp_path, 2)
    sent: list[list[Path]] = []
    monkeypatch.setattr(checkpoints.dist, "rank", lambda: 1)
    monkeypatch.setattr(checkpoints.dist, "broadcast_object", lambda mine: sent.append(mine) or [older])
    found = checkpoints.latest_checkpoint(tmp_path)
    assert found is not None and found.path == older and newest.is_dir()
    assert sent == [[]], "what the others see does not count"


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoints.latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint in"):
        checkpoints.best_checkpoint(tmp_path)


def foreign(folder: Path, version: int = 7) -> Path:
    """Turn a checkpoint into one of a later format, whose rules we do not know."""
    (folder / "manifest.json").write_text(json.dumps({"format_version": version, "parts": ["one"]}))
    (folder / "COMPLETE").write_text("its own sum")
    return folder


def test_other_format_versions_are_skipped_and_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = foreign(make(tmp_path, 3))
    with pytest.raises(
        ForeignCheckpointError, match=r"step-000003: checkpoint format 7, this version reads 1; resume it"
    ):
        checkpoints.open_checkpoint(folder)
    assert checkpoints.latest_checkpoint(tmp_path) is None
    (record,) = caplog.records
    assert record.levelname == "ERROR" and f"SKIPPED {folder}: checkpoint format 7" in record.message
    make(tmp_path, 2)
    assert [found.step for found in checkpoints.list_checkpoints(tmp_path)] == [2]
    assert f"not listed: {folder}: checkpoint format 7" in caplog.text
    latest = checkpoints.latest_checkpoint(tmp_path)
    assert latest is not None and latest.step == 2
    retention.mark_best(tmp_path, folder)
    assert checkpoints.best_checkpoint(tmp_path).step == 2


def test_other_format_versions_are_never_removed_and_do_not_count(tmp_path: Path) -> None:
    kept = [foreign(make(tmp_path, step)) for step in (1, 5)]
    for step in (2, 3, 4):
        make(tmp_path, step)
    retention.prune(tmp_path, keep=2)
    assert [checkpoints.step_of(path) for path in checkpoints.complete_folders(tmp_path)] == [1, 3, 4, 5]
    found = checkpoints.latest_checkpoint(tmp_path)
    assert found is not None
    retention.set_damaged_aside(tmp_path, found)
    assert all(path.is_dir() for path in kept)
    for again in ("", "-2"):  # a run that started over reaches their steps
        retention.set_foreign_aside(kept[1])
        assert (tmp_path / "checkpoints" / f"foreign-step-000005{again}").is_dir() and not kept[1].exists()
        foreign(make(tmp_path, 5))
    retention.set_foreign_aside(tmp_path / "checkpoints" / "step-000004")
    assert found.path.is_dir()


def test_every_so_many_steps_one_stays(tmp_path: Path) -> None:
    for step in (100, 150, 200, 250, 300, 1_000_000):
        make(tmp_path, step)
    retention.prune(tmp_path, keep=1, keep_every_steps=200)
    assert [found.step for found in checkpoints.list_checkpoints(tmp_path)] == [200, 1_000_000]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    """`step-1000000` sorts before `step-999900` as text."""
    for step in (999_900, 1_000_000, 99_999_999):
        make(tmp_path, step)
    (tmp_path / "checkpoints" / "step-of-mine").mkdir()
    (tmp_path / "checkpoints" / "step-of-mine" / "COMPLETE").touch()
    assert [found.step for found in checkpoints.list_checkpoints(tmp_path)] == [999_900, 1_000_000, 99_999_999]
    latest = checkpoints.latest_checkpoint(tmp_path)
    assert latest is not None and latest.step == 99_999_999
    retention.prune(tmp_path, keep=2)
    assert [found.step for found in checkpoints.list_checkpoints(tmp_path)] == [1_000_000, 99_999_999]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"step": 2}', '{"format_version": 1, "step": 2, "world_size": 2, "parts": {"part.bin": {}}}'],
)
def test_a_damaged_manifest_is_damage_like_any_other(tmp_path: Path, text: str) -> None:
    make(tmp_path, 1)
    folder = make(tmp_path, 2)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DamagedCheckpointError, match=r"step-000002/manifest\.json is damaged: "):
        checkpoints.open_checkpoint(folder)
    assert [found.step for found in checkpoints.list_checkpoints(tmp_path)] == [1]
    latest = checkpoints.latest_checkpoint(tmp_path, "fall_back")
    assert latest is not None and latest.step == 1


def test_a_changed_manifest_that_still_reads_is_found(tmp_path: Path) -> None:
    folder = make(tmp_path, 2)
    text = (folder / "manifest.json").read_text()
    (folder / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())
    assert checkpoints.open_checkpoint(folder).step == 2
    (folder / "manifest.json").write_text(text.replace('"step": 2', '"step": 3'))
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json is damaged: its sha256 differs from COMPLETE"):
        checkpoints.open_checkpoint(folder)


def damage_part(folder: Path) -> None:
    (folder / "part.bin").write_bytes(b"weighTs")


def test_the_newest_intact_checkpoint_is_used_and_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    intact, *damaged = (make(tmp_path, step) for step in (1, 2, 3))
    for folder in damaged:
        damage_part(folder)
    found = checkpoints.latest_checkpoint(tmp_path, "fall_back")
    assert found is not None and found.path == intact
    (record,) = caplog.records
    assert record.levelname == "ERROR" and f"FALLING BACK to {intact}, which is intact" in record.message
    assert all(f"{folder}/part.bin is damaged: its sha256 differs" in record.message for folder in damaged)


def test_damage_can_be_told_to_stop(tmp_path: Path) -> None:
    make(tmp_path, 1)
    damage_part(make(tmp_path, 2))
    with pytest.raises(
        DamagedCheckpointError, match=r"step-000001 is intact, but train\.checkpoint\.damaged is `stop`"
    ) as e:
        checkpoints.latest_checkpoint(tmp_path, "stop")
    assert e.value.exit_code == 6 and "part.bin is damaged" in str(e.value)


@pytest.mark.parametrize("rule", ["fall_back", "stop"])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path: Path, rule: Literal["stop"]) -> None:
    for step in (1, 2):
        damage_part(make(tmp_path, step))
    with pytest.raises(DamagedCheckpointError, match="no complete checkpoint is intact; fix: restore the files"):
        checkpoints.latest_checkpoint(tmp_path, rule)


def test_the_best_checkpoint_may_be_damaged_or_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [make(tmp_path, step) for step in (1, 2, 3)]
    for folder in folders:
        recipe = resolve(load_recipe("demo_contrastive", [f"run_dir={tmp_path}"]), 1)
        (folder / "recipe.resolved.yaml").write_text(recipe.to_yaml())
    retention.mark_best(tmp_path, folders[0])
    assert checkpoints.best_checkpoint(tmp_path).step == 1 and not caplog.records
    damage_part(folders[0])
    assert checkpoints.best_checkpoint(tmp_path).step == 3 and "FALLING BACK to" in caplog.text
    shutil.rmtree(folders[0])
    assert checkpoints.best_checkpoint(tmp_path).step == 3
    assert "the best checkpoint step-000001 does not exist; using the newest" in caplog.text


def test_a_part_that_cannot_be_read_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoints.open_checkpoint(make(tmp_path, 1))

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checkpoints, "sha256_of", broken)
    assert checkpoints.verify(checkpoint) == [f"{checkpoint.path}/part.bin cannot be read: Input/output error"]


def test_a_damaged_checkpoint_set_aside_does_not_count(tmp_path: Path) -> None:
    """Left under its name it would be one of the newest that pruning keeps, in place of an intact one."""
    make(tmp_path, 1)
    for _ in range(2):
        damage_part(make(tmp_path, 3))
        found = checkpoints.latest_checkpoint(tmp_path, "fall_back")
        assert found is not None
        retention.set_damaged_aside(tmp_path, found)
    make(tmp_path, 2)
    retention.prune(tmp_path, keep=1)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["damaged-step-000003", "damaged-step-000003-2", "step-000002"]


def test_verify_names_missing_short_and_flipped_parts(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    checkpoint = checkpoints.open_checkpoint(folder)
    assert checkpoints.verify(checkpoint) == []
    (folder / "part.bin").write_bytes(b"weighTs")
    assert "part.bin is damaged" in checkpoints.verify(checkpoint)[0]
    (folder / "part.bin").write_bytes(b"wei")
    assert "part.bin has 3 bytes, the manifest says 7" in checkpoints.verify(checkpoint)[0]
    (folder / "part.bin").unlink()
    assert "part.bin is missing" in checkpoints.verify(checkpoint)[0]


def test_a_crash_while_one_is_removed_leaves_what_the_next_start_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not half a checkpoint under its old name, which nothing would ever look at again."""
    older, newer = make(tmp_path, 1), make(tmp_path, 2)
    with monkeypatch.context() as crash:
        crash.setattr(retention.shutil, "rmtree", lambda *_, **__: None)
        retention.remove(older)
    assert checkpoints.complete_folders(tmp_path) == [newer] and not older.exists()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    retention.remove_leftovers(tmp_path / "checkpoints")
    assert list((tmp_path / "checkpoints").iterdir()) == [newer]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    folders = [make(tmp_path, step) for step in (1, 2, 3, 4)]
    leftover = tmp_path / "checkpoints" / ".tmp-step-000005"
    leftover.mkdir()
    converted = [checkpoints.universal_folder(folder) for folder in folders[1:3]]
    for copy in converted:
        copy.mkdir()
    retention.mark_best(tmp_path, folders[1])
    retention.prune(tmp_path, keep=1)
    assert [copy.exists() for copy in converted] == [True, False]
    assert [found.step for found in checkpoints.list_checkpoints(tmp_path)] == [2, 4]
    assert checkpoints.best_checkpoint(tmp_path).step == 2
    assert not leftover.exists()


def test_write_durably_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "best"
    write_durably(path, "a long old value")
    write_durably(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_random_numbers_continue_where_they_were(tmp_path: Path) -> None:
    import random

    import numpy as np
    import torch

    seed_everything(3, rank=1)
    torch.save(rng_state(), tmp_path / "rng.pt")
    first = random.random(), float(np.random.rand()), float(torch.rand(()))
    restore_rng(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == first


def test_loaded_step_counts_are_counted_once_each_and_by_the_fused_kernel() -> None:
    """As DeepSpeed leaves them: one count for all groups, and the groups' options as an older release saved them."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in parameters], lr=0.1)
    shared = torch.tensor(4.0)
    for parameter in parameters:
        optimizer.state[parameter] = {"step": shared, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
        parameter.grad = torch.ones(3)
    renew_adam(SimpleNamespace(optimizer=optimizer))
    optimizer.step()
    assert [optimizer.state[parameter]["step"].item() for parameter in parameters] == [5.0, 5.0]
    assert all(group["fused"] for group in optimizer.param_groups)
    assert torch.equal(*parameters)
    renew_adam(optimizer)  # without ZeRO there is nothing around it
