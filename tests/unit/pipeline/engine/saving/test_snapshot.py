"""Host copies of a rank's state: the same bytes in a file, and nothing that changes later."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.engine.saving.snapshot import HostBuffers, capture


def saved(tree: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def state() -> dict[str, Any]:
    """As DeepSpeed's: views of one flat tensor, a part without its padding, containers met twice, own objects."""
    flat = torch.arange(10.0)
    marked = torch.ones(3, requires_grad=True)
    marked.ds_id = [7]  # type: ignore[attr-defined]
    half = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    groups = [{"lr": 0.1, "params": [0, 1]}]
    named = OrderedDict(a=flat[:4].view(2, 2), b=flat.narrow(0, 4, 5))
    return {
        "module": named, "flat": [flat, flat], "marked": (marked, half), "groups": groups, "again": groups,
        "empty": torch.empty(0), "step": torch.tensor(3), "shape": torch.Size([2, 2]),
        "scaler": SimpleNamespace(scale=1.0), "transposed": torch.arange(6).view(2, 3).t(),
    }  # fmt: skip


def test_a_copy_is_the_same_bytes_in_a_file_and_stays_so() -> None:
    tree, buffers = state(), HostBuffers()
    before = saved(tree)
    buffers.begin()
    copied = buffers.copy(tree)
    buffers.end()
    tree["flat"][0].zero_()
    tree["groups"][0]["lr"] = 0.2
    tree["scaler"].scale = 2.0
    assert saved(copied) == before != saved(tree)
    assert copied["groups"] is copied["again"] and copied["flat"][0] is copied["flat"][1]
    assert copied["marked"][0].ds_id == [7] and copied["marked"][0].requires_grad


def test_memory_is_used_again_and_what_shares_memory_is_copied_once() -> None:
    tree, buffers = state(), HostBuffers()
    found = []
    for _ in range(2):
        buffers.begin()
        copied = buffers.copy(tree)
        buffers.end()
        found.append((copied["flat"][0].data_ptr(), buffers.size))
    assert found[0] == found[1]
    assert found[0][1] == 40 + 12 + 4 + 8 + 48, "flat, marked, its parameter, step, transposed: no view has its own"
    buffers.begin()
    smaller = buffers.copy({"flat": tree["flat"][0]})
    buffers.end()
    assert smaller["flat"].data_ptr() == found[0][0] and buffers.size == 40


class Engine:
    """DeepSpeed's, as far as a save goes."""

    def __init__(self) -> None:
        self.checkpoint_engine: Any = SimpleNamespace(save=self.write, is_decoupled=lambda: False)
        self.written: list[tuple[str, Any]] = []

    def write(self, state: Any, path: str) -> None:
        self.written.append((path, state))

    def _copy_recovery_script(self, folder: str) -> None:
        self.written.append((folder, "script"))

    def save(self) -> None:
        assert not self.checkpoint_engine.is_decoupled()
        self.checkpoint_engine.makedirs("/nowhere/deepspeed", exist_ok=True)
        self.checkpoint_engine.save({"weights": 1}, "/nowhere/deepspeed/model.pt")
        self._copy_recovery_script("/nowhere")


def test_what_deepspeed_would_write_is_caught_and_written_later_by_its_own_engine() -> None:
    engine = Engine()
    own = engine.checkpoint_engine
    captured = capture(engine, engine.save, lambda state: {**state, "taken": True})
    assert engine.written == [] and engine.checkpoint_engine is own
    assert "_copy_recovery_script" not in vars(engine)
    for write in (*captured.files.values(), *captured.scripts):
        write()
    assert list(captured.files) == [Path("/nowhere/deepspeed/model.pt")]
    assert engine.written == [
        ("/nowhere/deepspeed/model.pt", {"weights": 1, "taken": True}),
        ("/nowhere", "script"),
    ]


def test_the_engine_is_as_before_after_an_error() -> None:
    engine = Engine()
    own = engine.checkpoint_engine
    engine.checkpoint_engine.is_decoupled = lambda: True
    with pytest.raises(AssertionError):
        capture(engine, engine.save, lambda state: state)
    assert engine.checkpoint_engine is own and "_copy_recovery_script" not in vars(engine)
