"""Learning-rate rules against hand-computed values."""

from __future__ import annotations

import pytest

from pipeline.config.train_schema import OptimizerConfig
from pipeline.engine.schedule import learning_rate


def rates(total: int, **values: object) -> list[float]:
    config = OptimizerConfig(lr=1.0, final_lr_fraction=0.1, **values)
    return [learning_rate(config, step, total) for step in range(total)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert rates(10, warmup_steps=4)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_starts_at_the_peak_passes_the_middle_and_ends_at_the_floor() -> None:
    found = rates(11, schedule="cosine")
    assert (found[0], found[5], found[10]) == pytest.approx((1.0, 0.55, 0.1))
    assert found == sorted(found, reverse=True)


def test_wsd_is_stable_then_linear() -> None:
    found = rates(11, schedule="wsd", decay_fraction=0.5)
    assert found[:6] == pytest.approx([1.0] * 6)
    assert found[10] == pytest.approx(0.1)
    assert found[6] - found[7] == pytest.approx(found[8] - found[9])


def test_constant_stays() -> None:
    assert rates(5, schedule="constant", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0])
