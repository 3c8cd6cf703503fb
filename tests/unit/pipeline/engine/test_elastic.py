"""Loading a checkpoint of another layout: what is refused. What is loaded is in tests/multiproc/test_elastic.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.engine.elastic import load_elastically
from pipeline.engine.zero_layout import uncut
from pipeline.errors import CheckpointError


def engine(module: nn.Module, nvme: bool = False) -> Any:
    return SimpleNamespace(
        module=module,
        zero_optimization_stage=lambda: 0,
        zero_nvme_offload_optimizer=lambda: nvme,
        optimizer=torch.optim.SGD(module.parameters()),
    )


def shards(**shapes: tuple[int, ...]) -> Any:
    layout = uncut({name: torch.Size(shape) for name, shape in shapes.items()}, 2)
    return SimpleNamespace(folder=Path("run/step-000002"), layout=layout, world_size=2, zero_stage=3)


def test_a_state_on_nvme_cannot_take_over_the_shards_of_others() -> None:
    with pytest.raises(
        CheckpointError, match=r"run/step-000002 was saved by other ranks.*offload_optimizer.device=cpu"
    ):
        load_elastically(engine(nn.Linear(2, 3), nvme=True), shards())


def test_other_parameters_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError) as error:
        load_elastically(engine(nn.Linear(2, 3)), shards(weight=(3, 4), head=(5,)))
    assert str(error.value) == (
        "run/step-000002 holds other parameters than this run trains:\n"
        "  bias: not saved, (3,) trained\n  head: (5,) saved, not trained\n  weight: (3, 4) saved, (3, 2) trained\n"
        "  fix: the recipe of the run that saved, or a new run_dir"
    )


def test_an_optimizer_with_groups_of_its_own_counts_in_their_order() -> None:
    """Those of earlier releases have no names: decayed parameters first."""
    shapes = {"bias": torch.Size([3]), "weight": torch.Size([3, 2]), "head": torch.Size([2, 3])}
    assert [uncut(shapes, 1).places[name] for name in shapes] == [(2, 0), (0, 0), (1, 0)]
    groups = [{"names": ["head"]}, {"names": ["weight"]}, {"names": ["bias"]}]
    assert [uncut(shapes, 1, groups).places[name] for name in shapes] == [(2, 0), (1, 0), (0, 0)]


def test_of_many_other_parameters_the_first_are_named() -> None:
    saved = {f"layer_{number}": (1,) for number in range(9)}
    with pytest.raises(CheckpointError, match=r"layer_6: \(1,\) saved, not trained\n  and 3 more\n"):
        load_elastically(engine(nn.Linear(2, 3)), shards(**saved))
