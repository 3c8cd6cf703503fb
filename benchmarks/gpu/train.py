"""`slt train` with first weights that depend on their names alone: draws of the CPU and of the device, or under ZeRO-3
and without it, are never equal, and then nothing about their losses could be compared.

    python -m benchmarks.gpu.train RECIPE [--set a.b=c ...]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import zlib
from typing import Any

import torch
from torch import nn

from launch.environment import set_defaults


def fill(module: nn.Module, trains: dict[str, bool]) -> None:
    """Overwrite what is drawn in the parts that train (not biases, norms and scales, which begin with one number):
    normal numbers, the variance one over the inputs."""
    import deepspeed

    for name, parameter in module.named_parameters():
        if not trains[name.split(".")[0]]:
            continue
        sharded = hasattr(parameter, "ds_id")  # set by DeepSpeed on what ZeRO-3 has partitioned
        whole: Any = (
            deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if sharded else contextlib.nullcontext()
        )
        with whole, torch.no_grad():
            if parameter.numel() > 1 and parameter.min() != parameter.max():
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                inputs = parameter.numel() // parameter.shape[0] if parameter.dim() > 1 else parameter.numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * inputs**-0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    options = parser.parse_args()
    set_defaults()
    from launch.train import run_rank
    from pipeline.stages import base

    freeze = base.apply_freeze_plan

    def fill_and_freeze(module: nn.Module, plan: dict[str, bool], *others: Any) -> list[str]:
        fill(module, plan)
        return freeze(module, plan, *others)

    base.apply_freeze_plan = fill_and_freeze
    return run_rank(options.recipe, options.sets)


if __name__ == "__main__":
    sys.exit(main())
