"""A frozen part that moved is our own mistake, and found."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.dist import Ranks
from pipeline.engine.observers import frozen
from pipeline.engine.observers.frozen import FrozenParts, sums_of_bits


def test_what_is_frozen_is_compared_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.ModuleDict({"trained": nn.Linear(2, 2), "frozen": nn.Linear(2, 2).requires_grad_(False)})
    training: Any = SimpleNamespace(engine=SimpleNamespace(module=module), ranks=Ranks(0, 0, 1))
    parts = FrozenParts(training)
    trained, frozen = (next(module[name].parameters()) for name in ("trained", "frozen"))
    with torch.no_grad():
        trained.add_(1.0)
        with caplog.at_level(logging.INFO):
            parts.on_end()
        assert "frozen parameters unchanged" in caplog.text
        frozen[0, 0] += 1e-6
    with pytest.raises(AssertionError, match="a frozen parameter changed during training"):
        parts.on_end()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_every_bit_counts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_AT_ONCE", 4)  # several parts
    tensor = torch.arange(9).view(3, 3).T.to(dtype)  # not contiguous
    before = sums_of_bits(tensor)
    seen = {tuple(before.tolist())}
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).clone()
    for place in range(len(flat)):
        for bit in range(8 if dtype != torch.bool else 1):
            changed = flat.clone()
            changed[place] ^= 1 << bit
            seen.add(tuple(sums_of_bits(changed.view(dtype).view(3, 3)).tolist()))
    assert len(seen) == 1 + len(flat) * (8 if dtype != torch.bool else 1)
    assert torch.equal(sums_of_bits(tensor.contiguous()), before)


def test_an_exchange_of_weights_is_found() -> None:
    first, second = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(sums_of_bits(torch.cat([first, second])), sums_of_bits(torch.cat([second, first])))
