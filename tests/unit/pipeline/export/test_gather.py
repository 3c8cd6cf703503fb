"""The tensors of a checkpoint, named and sized before they are read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.engine.zero_shards import ZeroShards
from pipeline.export.gather import checkpoint_entries
from tests.unit.pipeline.export.runs import finished_run, recipe_of


def test_floats_are_cast_counters_are_not_and_nothing_is_read_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, read = [], []

    def tensor(name: str, kind: str) -> torch.Tensor:
        read.append(f"{kind} {name}")
        return torch.ones(2, 3)

    def open_(folder: Path) -> SimpleNamespace:
        opened.append(folder)
        shared = {"tied": "weight", "tied_to_frozen": "elsewhere"}
        buffers = {"count": torch.tensor([3]), "mean": torch.zeros(2)}
        return SimpleNamespace(
            parameters={"weight": torch.Size([2, 3])}, shared=shared, buffers=lambda: buffers, tensor=tensor,
            exported="average",
        )  # fmt: skip

    monkeypatch.setattr(ZeroShards, "open", open_)
    checkpoint = finished_run(tmp_path, recipe_of("continued_pretraining"))
    found = {entry.name: entry for entry in checkpoint_entries(checkpoint, torch.bfloat16)}
    assert opened == [checkpoint.path / "deepspeed"] and read == []
    assert {name: (entry.shape, entry.dtype, entry.size) for name, entry in found.items()} == {
        "count": ((1,), torch.int64, 8), "mean": ((2,), torch.bfloat16, 4), "weight": ((2, 3), torch.bfloat16, 12),
        "tied": ((2, 3), torch.bfloat16, 12),
    }  # fmt: skip
    assert torch.equal(found["tied"].read(), torch.ones(2, 3)) and read == ["average weight"]
    assert found["count"].read().tolist() == [3]
