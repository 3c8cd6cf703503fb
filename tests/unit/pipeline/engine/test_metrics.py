"""The peak that utilisation refers to, and metrics as people read them."""

from __future__ import annotations

import json

from pipeline.config.train_schema import OptimizerConfig, TrainConfig
from pipeline.engine.metrics import describe, peak_tflops


def config(**values: object) -> TrainConfig:
    given = {"steps": 1, "global_batch": 1, "micro_batch": 1, "tensorboard": False}
    return TrainConfig(optimizer=OptimizerConfig(lr=1.0), **{**given, **values})


def test_peak_of_known_and_given_devices() -> None:
    assert peak_tflops(config(), "NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops(config(), "NVIDIA H100 PCIe") == 756.0
    assert peak_tflops(config(), "NVIDIA GH200 480GB") == 989.0
    assert (peak_tflops(config(), "NVIDIA L40"), peak_tflops(config(), "NVIDIA L4")) == (181.0, 121.0)
    assert peak_tflops(config(), "NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None, "a slice computes less than the whole"
    assert peak_tflops(config(), "cpu") is None
    assert peak_tflops(config(peak_tflops=1.5), "cpu") == 1.5


def test_describe() -> None:
    assert describe({"train/loss": 1.23456, "big": 3e9, "nan": float("nan")}) == "loss 1.235  big 3.000e+09  nan nan"
    json.dumps({})
