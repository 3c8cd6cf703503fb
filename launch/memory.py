"""`slt launch plan` and the memory of one rank: how large a GPU is, the planner's table, the verdict."""

from __future__ import annotations

import re
import subprocess
from typing import Any

from rich.table import Table

from pipeline.config.planner import Answer
from pipeline.errors import RecipeError
from shards.terminal import table_console

GIB_OF_DEVICE = {"v100": 32, "a100-40": 40, "a100": 80, "l40s": 48, "rtx4090": 24, "h100": 80, "h200": 141, "b200": 180}
"""Memory that `--gpu-memory` understands by name, in GiB as the makers round it."""
_GIB = 1024**3
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:g|gb|gib)?", re.IGNORECASE)
_SECONDS = 30.0


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


def detected_gib() -> float | None:
    """Memory of this machine's smallest NVIDIA GPU; None if none is listed."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):  # no NVIDIA tools here, or a driver that hangs
        return None
    sizes = [int(line) for line in result.stdout.split() if line.isdecimal()] if result.returncode == 0 else []
    return min(sizes) / 1024 if sizes else None


def print_memory(answer: Answer, world_size: int) -> None:
    """A table with one row per item, the largest first, and the phases in which it is there."""
    plan = answer.plan
    table = Table(title=f"memory of one of {world_size} ranks", title_justify="left")
    for name, justify in (("GiB", "right"), ("item", "left"), ("when", "left"), ("rule", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for line in sorted(plan["lines"], key=lambda item: -item["bytes"]):
        table.add_row(f"{line['bytes'] / _GIB:.2f}", line["item"], _when(line, plan["lines"]), line["rule"])
    table.add_section()
    table.add_row(f"{plan['peak_bytes'] / _GIB:.2f}", "peak", plan["phase"], "all items of this phase")
    table_console(highlight=False, markup=False).print(table)


def _when(line: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    everywhere = max(len(other["phases"]) for other in lines)
    return "always" if len(line["phases"]) == everywhere else ", ".join(line["phases"])


__all__ = ["GIB_OF_DEVICE", "detected_gib", "gpu_gib", "print_memory"]
