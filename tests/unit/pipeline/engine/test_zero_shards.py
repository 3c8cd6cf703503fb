"""Folders that are no ZeRO checkpoint, or not a whole one, are named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine.zero_shards import ZeroShards
from pipeline.errors import CheckpointError


def adam(numel: int) -> dict[str, Any]:
    return {"step": torch.tensor(4.0), "exp_avg": torch.arange(float(numel)), "exp_avg_sq": torch.ones(numel)}


def write(folder: Path, stored: int = 4) -> Path:
    """Stage 3 on two ranks as DeepSpeed writes it: one parameter of 3 x 3, so 5 elements a rank."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    folder.mkdir()
    model = {
        "module": {"weight": torch.zeros(0)}, "buffer_names": [], "shared_params": {}, "ds_version": "0.19.8",
        "global_steps": 4, "global_samples": 8, "skipped_steps": 0,
        "param_shapes": [{"weight": torch.Size([3, 3])}],
    }  # fmt: skip
    torch.save(model, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank, numel in enumerate((5, stored)):
        state = {
            "zero_stage": ZeroStageEnum.weights, "partition_count": 2, "fp32_flat_groups": [torch.ones(numel)],
            "optimizer_state_dict": {"state": {0: adam(numel)}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        }  # fmt: skip
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def test_reads_without_an_engine(tmp_path: Path) -> None:
    shards = ZeroShards.open(write(tmp_path / "deepspeed"))
    assert shards.tensor("weight", "exp_avg").tolist() == [[0, 1, 2], [3, 4, 0], [1, 2, 3]]
    assert shards.tensor("weight", "exp_avg").tolist() == [[0, 1, 2], [3, 4, 0], [1, 2, 3]], "and once more"
    assert shards.step("weight") == 4


def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    """Reading 192 MB in tensors of 16 MB keeps no pages of the file."""
    numel = 1 << 22
    model = {
        "module": {f"w{n}": torch.zeros(0) for n in range(12)}, "buffer_names": [], "shared_params": {},
        "param_shapes": [{f"w{n}": torch.Size([numel]) for n in range(12)}],
    }  # fmt: skip
    shards_of(tmp_path, model, torch.ones(12 * numel))
    shards = ZeroShards.open(tmp_path)
    before = resident_pages_of_files_mib()
    for name in shards.parameters:
        assert float(shards.tensor(name).sum()) == numel
    assert resident_pages_of_files_mib() - before < 8


def shards_of(folder: Path, model: dict[str, Any], flat: torch.Tensor) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save(model, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    state = {"zero_stage": ZeroStageEnum.weights, "partition_count": 1, "fp32_flat_groups": [flat]}
    torch.save({"optimizer_state_dict": state}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def resident_pages_of_files_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) / 1024


def test_unknown_names(tmp_path: Path) -> None:
    shards = ZeroShards.open(write(tmp_path / "deepspeed"))
    with pytest.raises(CheckpointError, match="deepspeed holds no trained parameter bias"):
        shards.tensor("bias")
    with pytest.raises(CheckpointError, match="holds no trained parameter bias"):
        shards.step("bias")


def test_a_shard_that_is_too_short(tmp_path: Path) -> None:
    shards = ZeroShards.open(write(tmp_path / "deepspeed", stored=2))
    with pytest.raises(CheckpointError, match=r"deepspeed is damaged: the shard of rank 1 ends in weight"):
        shards.tensor("weight")


def test_a_missing_rank(tmp_path: Path) -> None:
    folder = write(tmp_path / "deepspeed")
    (folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: 1 of 2 \*_optim_states.pt; restore the missing files"):
        ZeroShards.open(folder)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a ZeRO checkpoint: it holds no \*_model_states.pt"):
        ZeroShards.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_files_that_torch_did_not_write(content: bytes, tmp_path: Path) -> None:
    folder = write(tmp_path / "deepspeed")
    file = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file} is not a file of a ZeRO checkpoint: "):
        ZeroShards.open(folder)


def test_files_that_name_other_classes_are_not_executed(tmp_path: Path) -> None:
    torch.save({"module": shutil.rmtree}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(
        CheckpointError, match=r"(?s)is not a file of a ZeRO checkpoint: .*shutil.rmtree was not an allowed"
    ):
        ZeroShards.open(tmp_path)


@pytest.mark.parametrize("model", [{}, {"no": "model"}, {"module": {}, "buffer_names": [], "optimizer": None}])
@pytest.mark.parametrize("cut", [False, True])
def test_model_files_of_something_else(model: dict[str, Any], cut: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "deepspeed")
    torch.save(model, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for file in [] if cut else folder.glob("*_optim_states.pt"):
        file.unlink()
    with pytest.raises(CheckpointError, match="deepspeed is not a ZeRO checkpoint: "):
        ZeroShards.open(folder)


@pytest.mark.parametrize("state", [{}, {"zero_stage": 3}])
def test_optimizer_files_of_something_else(state: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "deepspeed")
    for rank in (0, 1):
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match="deepspeed is not a ZeRO checkpoint: "):
        ZeroShards.open(folder)


def stage_0(folder: Path, moments: dict[int, dict[str, Any]]) -> Path:
    model = {
        "module": {"bias": torch.ones(2), "weight": torch.ones(2, 2)}, "buffer_names": [], "dp_world_size": 2,
        "optimizer": {"state": moments, "param_groups": []},
    }  # fmt: skip
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    return folder


def test_moments_begin_as_zeros(tmp_path: Path) -> None:
    shards = ZeroShards.open(stage_0(tmp_path, {}))
    assert shards.tensor("weight", "exp_avg").tolist() == [[0, 0], [0, 0]] and shards.step("weight") == 0


def test_a_transposed_weight(tmp_path: Path) -> None:
    """Stored as it lies in memory; reading it must not disturb what lies around a copy."""
    weight = torch.arange(1 << 16, dtype=torch.float32).view(256, 256)
    model = {
        "module": {"weight": weight.T}, "buffer_names": [], "dp_world_size": 1,
        "optimizer": {"state": {}, "param_groups": []},
    }  # fmt: skip
    torch.save(model, tmp_path / "mp_rank_00_model_states.pt")
    shards = ZeroShards.open(tmp_path)
    assert torch.equal(shards.tensor("weight"), weight.T) and torch.equal(shards.tensor("weight"), weight.T)


def test_states_on_nvme(tmp_path: Path) -> None:
    (write(tmp_path / "deepspeed") / "offloaded_tensors").mkdir()
    with pytest.raises(CheckpointError, match=r"keeps the optimizer's state as NVMe files, .* and save once"):
        ZeroShards.open(tmp_path / "deepspeed")


def test_moments_of_other_parameters(tmp_path: Path) -> None:
    stage_0(tmp_path, {0: {"exp_avg": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match="not a checkpoint of this trainer: the moments of weight do not fit it"):
        ZeroShards.open(tmp_path)
