"""How much memory a GPU has, as the command line says it."""

from __future__ import annotations

import re

from pipeline.errors import RecipeError

GIB_OF_DEVICE = {"v100": 32, "a100-40": 40, "a100": 80, "l40s": 48, "rtx4090": 24, "h100": 80, "h200": 141, "b200": 180}
"""Memory that `--gpu-memory` understands by name, in GiB as the makers round it."""
GPU_MEMORY = "Of one GPU: 80, 80GiB or a name such as h100; short for --set deepspeed.gpu_memory_gib=..."
"""Help of the option `--gpu-memory`."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:g|gb|gib)?", re.IGNORECASE)


def gpu_gib(text: str) -> float:
    """`80`, `80GiB` or a device's name -> GiB. Raises RecipeError for anything else."""
    name = text.strip().lower()
    size = _SIZE.fullmatch(name)
    if size is not None and float(size[1]) > 0:
        return float(size[1])
    if name in GIB_OF_DEVICE:
        return float(GIB_OF_DEVICE[name])
    known = ", ".join(GIB_OF_DEVICE)
    raise RecipeError(f"--gpu-memory must be a size such as 80 or 80GiB, or one of {known}, got {text}")


__all__ = ["GIB_OF_DEVICE", "GPU_MEMORY", "gpu_gib"]
