"""`slt launch plan` and the memory of one rank: how large this machine's GPUs are, and the planner's table."""

from __future__ import annotations

import subprocess
from typing import Any

from rich.table import Table

from pipeline.config.planner import Answer
from shards.terminal import table_console

_GIB = 1024**3
_SECONDS = 30.0


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


__all__ = ["detected_gib", "print_memory"]
