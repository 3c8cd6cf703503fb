"""What the sections of the probe share: results that are on disk the moment they are known, options, the made data."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Probe:
    """What a section is told: where to write, whether to run at toy size on the CPU, and its own name."""

    section: str
    out: Path
    work: Path
    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def add(self, name: str, ok: bool, value: float | str | None = None, unit: str = "", **detail: Any) -> None:
        """Append one result and force it to disk: a machine that goes away takes nothing with it."""
        row = {"section": self.section, "name": name, "ok": ok, "value": value, "unit": unit, "detail": detail}
        append(self.out, row)


def append(path: Path, row: dict[str, Any]) -> None:
    """One JSON line, flushed to disk; lines of several processes do not mix."""
    line = json.dumps({"time": round(time.time(), 1), **row}, ensure_ascii=False, default=str) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> list[dict[str, Any]]:
    """Every complete row of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def run_section(section: str, run: Callable[[Probe], None]) -> None:
    """Command line of a section; an error becomes a row before it ends the process."""
    parser = argparse.ArgumentParser(description=section)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    probe = Probe(section, options.out, options.work, options.dry)
    try:
        run(probe)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        first_line = (str(error).strip().splitlines() or [""])[0]
        probe.add("error", False, f"{type(error).__name__}: {first_line[:160]}", where=where, text=str(error)[-2000:])
        raise


def world(probe: Probe) -> Path:
    """The generated sign corpus, its shards and its tokenizer; made once, whoever comes first."""
    from pipeline.demo.data import prepare
    from pipeline.demo.settings import DemoSize

    folder = probe.work / "world"
    if not probe.dry:
        size = DemoSize(train=64, dev=8, test=8, test_signer=4, text_train=800, text_dev=40)
    else:
        size = DemoSize(train=16, dev=4, test=4, test_signer=2, text_train=120, text_dev=20)
    prepare(folder, size, seed=0, workers=1 if probe.dry else 8)
    return folder
