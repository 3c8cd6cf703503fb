"""Tensors read by name from real shards are those that DeepSpeed's own converters find in them."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import dist
from pipeline.engine.zero_shards import KINDS, ZeroShards
from tests.ranks import run_ranks
from tests.zero_engines import Kind, start, take_steps

pytestmark = pytest.mark.multiproc

ENGINES = [
    *(Kind(stage, bf16) for stage in (0, 1, 2, 3) for bf16 in (False, True)),
    *(Kind(stage, bf16=True, offload=True) for stage in (1, 3)),
    *(Kind(stage, small_groups=True) for stage in (2, 3)),
    Kind(1, bf16=True, fp32_gradients=True),
]
DEALT = Kind(2, small_groups=True)
"""ds_to_universal of DeepSpeed 0.19.8 reads the parameters of such a checkpoint in a wrong order."""
TRAINED = [
    "gain", "embed.weight", "body.weight", "body.bias", "norm.weight", "norm.bias", "back.weight", "back.bias",
]  # fmt: skip


def save_all(rank: int, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """One checkpoint of each kind after two steps; returns what stage 0 holds in memory."""
    dist.init()
    return [save_one(kind, folder / str(number), rank, world_size) for number, kind in enumerate(ENGINES)]


def save_one(kind: Kind, folder: Path, rank: int, world_size: int) -> dict[str, Any]:
    engine = start(kind, world_size)
    take_steps(engine, rank, world_size, 0, 2)
    engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
    live = live_stage_0(engine) if kind.stage == 0 else {}
    engine.destroy()
    return live


def live_stage_0(engine: Any) -> dict[str, Any]:
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    of_model = getattr(engine.optimizer, "fp16_groups", [group["params"] for group in inner.param_groups])
    state = {}
    for group, parameters in zip(inner.param_groups, of_model, strict=True):
        for own, parameter in zip(group["params"], parameters, strict=True):
            moments = inner.state[own]
            kept = {"weight": own, "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
            state[names[parameter]] = {key: value.detach().clone() for key, value in kept.items()}
    return state


def by_deepspeed(folder: Path, kind: Kind) -> dict[str, dict[str, torch.Tensor]]:
    """What ds_to_universal and zero_to_fp32 read."""
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    arguments = argparse.Namespace(
        input_folder=str(folder / "deepspeed"), output_folder=str(folder / "universal"), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
        found: dict[str, dict[str, torch.Tensor]] = {}
        if not kind.fp32_gradients:
            found["zero_to_fp32"] = get_fp32_state_dict_from_zero_checkpoint(
                str(folder), "deepspeed", exclude_frozen_parameters=True
            )
    for name in TRAINED:
        part = folder / "universal" / "zero" / name
        for kind, file in zip(KINDS, ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"), strict=True):
            tensor = torch.load(part / file, weights_only=False)
            tensor = tensor["param"] if isinstance(tensor, dict) else tensor
            found.setdefault(name, {})[kind] = tensor
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_tensor_is_what_deepspeed_reads(world_size: int, tmp_path: Path) -> None:
    live = run_ranks(save_all, world_size, tmp_path, timeout=240)[0]
    for number, kind in enumerate(ENGINES):
        shards = ZeroShards.open(tmp_path / str(number) / "deepspeed")
        assert (shards.zero_stage, shards.world_size) == (kind.stage, world_size)
        assert list(shards.parameters) == TRAINED, "the model's order"
        assert shards.shared == {"head.weight": "embed.weight"}
        assert {name: buffer.tolist() for name, buffer in shards.buffers().items()} == {"scale": [0.5]}
        # DeepSpeed 0.19.8 takes a step of its own before the first one under stage 0 in bf16
        assert {shards.step(name) for name in TRAINED} == {3 if kind.bf16 and kind.stage == 0 else 2}
        expected = by_deepspeed(tmp_path / str(number), kind) if kind.stage else live[number]
        for name in TRAINED:
            for what in KINDS:
                tensor = shards.tensor(name, what)
                assert tensor.dtype == torch.float32 and tensor.is_contiguous()
                assert tensor.shape == shards.parameters[name]
                if kind == DEALT:
                    same = ZeroShards.open(tmp_path / str(ENGINES.index(Kind(2))) / "deepspeed")
                    torch.testing.assert_close(tensor, same.tensor(name, what))
                else:
                    assert torch.equal(tensor, expected[name][what].view(tensor.shape)), (kind, name, what)
            if kind.stage and not kind.fp32_gradients:  # zero_to_fp32 does not open what the other optimizer saves
                assert torch.equal(shards.tensor(name), expected["zero_to_fp32"][name]), (kind, name)
        assert torch.equal(shards.tensor("head.weight"), shards.tensor("embed.weight"))
