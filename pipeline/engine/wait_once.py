"""One wait for the device per optimizer step inside DeepSpeed; 0.19.8 by itself waits three to six times.

A step that would apply gradients with an infinity is skipped, and that decision is the host's: it must see the global
gradient norm. DeepSpeed also asks for what the norm already says, and copies constants to the device with a wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def wait_once(optimizer: Any) -> None:
    """Let a ZeRO optimizer ask for the norm and for nothing else; every value stays the same to the bit.

    One that offloads its state to the host waits anyway and is left alone, like an optimizer without ZeRO.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not optimizer.offload_optimizer:
        _in_stage_3(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload and optimizer.compute_grad_norm:
        _in_stages_1_and_2(optimizer)


def _in_stage_3(optimizer: Any) -> None:
    norm_of_group = optimizer.get_grad_norm_direct

    def norm(*args: Any, **kwargs: Any) -> torch.Tensor:
        with _MadeThere():
            return norm_of_group(*args, **kwargs)

    optimizer.get_grad_norm_direct = norm


class _MadeThere(TorchFunctionMode):
    """A number that becomes a tensor of a device is written there by a kernel; torch makes it on the host and waits for
    the copy."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and "device" in kwargs:
            return torch.full((), args[0], **kwargs)
        return function(*args, **kwargs)


def _in_stages_1_and_2(optimizer: Any) -> None:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import stage_1_and_2

    if optimizer.overlap_comm and not get_accelerator().resolves_data_dependency():
        order_streams(optimizer, get_accelerator())
    stage_1_and_2.mask_nan_or_inf_with_val_inplace = _mask_not_finite
    if optimizer.dtype == torch.bfloat16 and not optimizer.check_grad_overflow:
        return  # the recipe asks for no check at all
    # the norm of gradients with an infinity or NaN is none either, and `step` skips by the norm, too
    optimizer.check_overflow = lambda partition_gradients=True: None

    def clip(groups: list[torch.Tensor], total_norm: torch.Tensor) -> None:
        """`unscale_and_clip_grads` of a norm that `step` has found to be finite."""
        scale = optimizer.loss_scale
        if optimizer.clip_grad > 0.0:
            scale = torch.clamp((total_norm / scale + 1e-6) / optimizer.clip_grad, min=1.0) * scale
        elif scale == 1.0:
            return
        for gradients in groups:
            gradients.data.mul_(1.0 / scale)

    optimizer.unscale_and_clip_grads = clip


def order_streams(optimizer: Any, accelerator: Any) -> None:
    """Behind a backward pass the device's own stream and that of the reductions wait for each other, on the device.
    DeepSpeed lets the host wait for the whole device there, in every micro-batch."""
    end_of_backward, reductions = optimizer.independent_gradient_partition_epilogue, optimizer.reduction_stream

    def wait_there(*_: object) -> None:
        present = accelerator.current_stream()
        reductions.wait_stream(present)
        present.wait_stream(reductions)

    def ordered() -> None:
        accelerator.synchronize = wait_there
        try:
            end_of_backward()
        finally:
            del accelerator.synchronize  # the method of its class is back

    optimizer.independent_gradient_partition_epilogue = ordered


def _mask_not_finite(input: torch.Tensor, device: object = None, val: float = -1.0) -> None:
    """DeepSpeed's `mask_nan_or_inf_with_val_inplace` without a tensor for the constant."""
    del device
    input.masked_fill_(~torch.isfinite(input), val)
