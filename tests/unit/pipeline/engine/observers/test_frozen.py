"""A frozen part that moved is our own mistake, and found."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.dist import Ranks
from pipeline.engine.observers.frozen import FrozenParts


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
