"""Waits of DeepSpeed that only a device has: the order of calls, on a machine without one."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from pipeline.engine.wait_once import order_streams


def test_streams_wait_for_each_other_instead_of_the_host() -> None:
    """Only at the end of the backward pass: later calls wait as DeepSpeed means them to."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Accelerator:
        def synchronize(self, index: int | None = None) -> None:
            log.append("the host waits")

        def current_stream(self) -> Stream:
            return Stream("computing")

    accelerator = Accelerator()

    def end_of_backward() -> None:
        log.append("reduced")
        accelerator.synchronize()
        log.append("freed")

    optimizer = SimpleNamespace(
        reduction_stream=Stream("reducing"), independent_gradient_partition_epilogue=end_of_backward
    )
    order_streams(optimizer, accelerator)
    optimizer.independent_gradient_partition_epilogue()
    accelerator.synchronize()
    assert log == [
        "reduced", "reducing waits for computing", "computing waits for reducing", "freed", "the host waits",
    ]  # fmt: skip


def test_where_deepspeed_waits() -> None:
    """If this fails, DeepSpeed has changed, and `order_streams` may have become needless."""
    source = inspect.getsource(DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue)
    assert "get_accelerator().synchronize()" in source
