"""From a checkpoint to a Hugging Face folder that is complete or absent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import CheckpointError
from pipeline.export import contents, hf, weights
from pipeline.export.entry import Entry
from pipeline.export.target import only_writer
from tests.unit.pipeline.disk import full_disk
from tests.unit.pipeline.export.runs import finished_run, recipe_of


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Tensors the checkpoint holds, in place of ZeRO shards."""
    tensors: dict[str, torch.Tensor] = {"weight": torch.ones(4)}

    def entries(checkpoint: object, dtype: torch.dtype) -> Iterator[Entry]:
        del checkpoint
        for name, tensor in tensors.items():
            yield Entry(name, tuple(tensor.shape), dtype, lambda tensor=tensor: tensor)

    monkeypatch.setattr(contents, "checkpoint_entries", entries)
    return tensors


def test_which_checkpoint(tmp_path: Path) -> None:
    resolved = recipe_of("continued_pretraining")
    first, last = (finished_run(tmp_path, resolved, step) for step in (1, 2))
    (tmp_path / "checkpoints" / "best").write_text("step-000001")
    assert hf.find_checkpoint(tmp_path, "best") == first and hf.find_checkpoint(tmp_path, "latest") == last
    assert hf.find_checkpoint(last.path, "best") == last, "a checkpoint folder means itself"
    (tmp_path / "step-by-step").symlink_to(tmp_path)
    assert hf.find_checkpoint(tmp_path / "step-by-step", "latest").step == last.step, "a run may be called so"


def test_no_checkpoint_to_export(tmp_path: Path) -> None:
    for which in ("best", "latest"):
        with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*/checkpoints; train first, or check"):
            hf.find_checkpoint(tmp_path, which)
    checkpoint = finished_run(tmp_path, recipe_of("continued_pretraining"))
    (checkpoint.path / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match=r"step-000005 is incomplete \(no COMPLETE file\); `slt ckpt list"):
        hf.find_checkpoint(checkpoint.path, "best")
    with pytest.raises(CheckpointError, match="no complete checkpoint in"):
        hf.find_checkpoint(tmp_path, "latest")


def test_an_export_replaces_the_old_one_as_a_whole(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    checkpoint = finished_run(tmp_path / "run", recipe_of("continued_pretraining"))
    out = tmp_path / "run" / "export"
    out.mkdir()
    (out / "from_an_older_version.json").write_text("{}")
    assert hf.export(tmp_path / "run", out, check=False) == {}
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "provenance.json", "recipe.resolved.yaml",
    ]  # fmt: skip
    assert torch.equal(load_file(out / "model.safetensors")["weight"], trained["weight"])
    assert json.loads((out / "provenance.json").read_text())["step"] == checkpoint.step
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    tmp_path: Path, trained: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = finished_run(tmp_path, recipe_of("continued_pretraining"))
    (checkpoint.path / "probe.safetensors").unlink()
    monkeypatch.setattr(hf, "find_checkpoint", lambda source, which: checkpoint)
    message = "Start the run again .*, choose another checkpoint, or export this one with --no-verify"
    with pytest.raises(CheckpointError, match=message) as raised:
        hf.export(tmp_path, tmp_path / "export")
    assert raised.value.exit_code == 2 and not (tmp_path / "export").exists() and not list(tmp_path.glob(".*"))
    assert hf.export(tmp_path, tmp_path / "export", check=False) == {}


def test_a_failed_export_leaves_the_old_one(
    tmp_path: Path, trained: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_run(tmp_path, recipe_of("continued_pretraining"))
    out = tmp_path / "export"
    hf.export(tmp_path, out, check=False)
    trained["weight"] = torch.zeros(100_000)
    message = (
        r"export to .*/export could not be written: .* writing model\.safetensors\.part.*; nothing was left behind"
    )
    with full_disk(), pytest.raises(CheckpointError, match=message):
        hf.export(tmp_path, out, check=False)

    def refuse(*_: object) -> dict[str, float]:
        raise CheckpointError("differs from the live one")

    monkeypatch.setattr(hf, "verify_export", refuse)
    with pytest.raises(CheckpointError, match="differs from the live one"):
        hf.export(tmp_path, out)
    assert load_file(out / "model.safetensors")["weight"].shape == (4,)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    checkpoint = finished_run(tmp_path, recipe_of("continued_pretraining"))
    (checkpoint.path / "hf" / "config.json").write_text('{"model_type": "lLama"}')
    with pytest.raises(CheckpointError, match=r"(?s)step-000005 is damaged:\n  .*config.json is damaged: its sha256"):
        hf.export(tmp_path, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_damaged_checkpoint_of_a_run_folder_is_passed_over(
    tmp_path: Path, trained: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    intact, damaged = (finished_run(tmp_path, recipe_of("continued_pretraining"), step) for step in (1, 2))
    (damaged.path / "hf" / "config.json").write_text('{"model_type": "lLama"}')
    (tmp_path / "checkpoints" / "best").write_text(damaged.path.name)
    for which in ("best", "latest"):
        hf.export(tmp_path, tmp_path / "export", which, check=False)
        assert json.loads((tmp_path / "export" / "provenance.json").read_text())["step"] == intact.step
    assert caplog.text.count(f"FALLING BACK to {intact.path}") == 2
    with pytest.raises(CheckpointError, match="step-000002 is damaged"):
        hf.export(damaged.path, tmp_path / "other", check=False)


def test_an_export_obeys_the_recipe_that_says_stop(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    resolved = recipe_of("continued_pretraining", "train.checkpoint.damaged=stop")
    _, damaged = (finished_run(tmp_path, resolved, step) for step in (1, 2))
    (damaged.path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step-000001 is intact, but train\.checkpoint\.damaged is `stop`"):
        hf.export(tmp_path, tmp_path / "export", check=False)


def test_heads_and_tied_weights_are_kept_apart(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    trained.clear()
    trained.update({f"{name}.weight": torch.ones(2) for name in ("visual.a", "visual.tied", "head")})
    plan = {"prefix": "visual.", "tied": ["tied.weight"], "frozen": []}
    finished_run(tmp_path, recipe_of("contrastive"), plan=plan)
    hf.export(tmp_path, tmp_path / "export", check=False)
    assert list(load_file(tmp_path / "export" / "model.safetensors")) == ["a.weight"]
    assert load_file(tmp_path / "export" / "heads.safetensors").keys() == {"head.weight"}


def test_a_killed_export_goes_on_and_is_byte_equal(
    tmp_path: Path, trained: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.update({f"layer.{at}": torch.randn(300) for at in range(6)})
    finished_run(tmp_path, recipe_of("continued_pretraining", "train.precision=fp32"))
    hf.export(tmp_path, tmp_path / "whole", check=False, max_shard_bytes=2500)

    class Killed(BaseException):
        """Nothing cleans up after it, as after SIGKILL."""

    real, written = weights.write_file, []

    def write_file(path: Path, *arguments: Any) -> str:
        written.append(path.name)
        if len(written) == 3:
            path.write_bytes(b"half")
            raise Killed
        return real(path, *arguments)

    monkeypatch.setattr(weights, "write_file", write_file)
    with pytest.raises(Killed):
        hf.export(tmp_path, tmp_path / "cut", check=False, max_shard_bytes=2500)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(CheckpointError, match="no LoRA adapters to keep"):
        hf.export(tmp_path, tmp_path / "cut", check=False, max_shard_bytes=2500, lora="keep")
    shown: list[tuple[int, int, str, int]] = []
    hf.export(tmp_path, tmp_path / "cut", check=False, max_shard_bytes=2500, show=lambda *row: shown.append(row))
    names = [f"model-0000{number}-of-00003.safetensors.part" for number in (1, 2, 3, 3)]
    assert written == names, "finished files are not written again"
    assert [row[2] for row in shown] == [f"MB, {done}/7 tensors" for done in (6, 7)]
    assert contents_of(tmp_path / "cut") == contents_of(tmp_path / "whole")
    hf.export(tmp_path, tmp_path / "cut", check=False, max_shard_bytes=2500)
    assert len(written) == 7, "a finished export is written anew"


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_two_exports_to_one_folder(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    finished_run(tmp_path, recipe_of("continued_pretraining"))
    with only_writer(tmp_path / "export"), pytest.raises(CheckpointError, match=r"another export to .* is running"):
        hf.export(tmp_path, tmp_path / "export", check=False)


def test_nothing_to_keep(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    finished_run(tmp_path, recipe_of("continued_pretraining"))
    message = "the model has no LoRA adapters to keep; leave out --lora keep"
    with pytest.raises(CheckpointError, match=message):
        hf.export(tmp_path, tmp_path / "export", check=False, lora="keep")
    assert not list(tmp_path.glob("*export*"))
