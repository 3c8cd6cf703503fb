"""What every benchmark writes: one JSON row per claim, with all it takes to repeat the measurement."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from shards.terminal import table_console

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Claim:
    """One measured statement. ``ratio`` is ours / peer, or its inverse where lower is better: above 1 is better.

    With a ratio the target is one for the ratio; without (no peer, or a limit in its place) it is one for our figure.
    """

    claim: str
    ours: float
    peer: float | None
    ratio: float | None
    target: float
    unit: str
    runs: int
    higher_is_better: bool = True
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        """Whether the target is met: by the ratio where there is a peer, else by our own figure."""
        value = self.ours if self.ratio is None else self.ratio
        return value >= self.target if self.ratio is not None or self.higher_is_better else value <= self.target


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory and devices of this machine."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["devices"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return found


def versions(*packages: str) -> dict[str, str]:
    """Python and the installed version of each package."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def commit() -> str:
    """The checked-out commit, with ``+changes`` when files differ from it; ``unknown`` outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _command() -> list[str]:
    """The command line without the folders of this machine."""
    return [Path(part).name if os.path.isabs(part) else part for part in sys.argv]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def write_receipt(rows: Sequence[Claim], out: Path | None, packages: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Print the claims as a table and, with ``out``, write them as JSON lines.

    Args:
        rows: the claims.
        out: file to write; None prints only.
        packages: whose versions the figures depend on.
    """
    table = Table("claim", "ours", "peer", "ratio", "target", "unit", "runs", "")
    for row in rows:
        shown = [f"{value:,.4g}" if value is not None else "-" for value in (row.ours, row.peer, row.ratio)]
        table.add_row(row.claim, *shown, f"{row.target:g}", row.unit, str(row.runs), "ok" if row.reached else "MISSED")
    table_console().print(table)
    about = {"hardware": hardware(), "versions": versions(*packages), "commit": commit(), "command": _command()}
    written = [{**asdict(row), "reached": row.reached, **about} for row in rows]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    return written
