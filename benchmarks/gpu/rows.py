"""What the sections share: figures that are on disk the moment they are known and are not measured twice, options,
the made data."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ABOUT = "about.json"
"""In the work folder: commit, hardware, versions and options, which every row repeats."""
IDENTITY = ("commit", "hardware", "options")
"""Rows that agree in these measured the same thing."""


@dataclass(frozen=True)
class Figure:
    """One measured number, or what was found in its place."""

    value: float | str | None = None
    unit: str = ""
    target: float | None = None
    at_most: bool = False
    """The target is an upper limit."""
    ok: bool = True
    """False: it does not work. A missed target is no failure; it is marked in `reached`."""
    detail: Mapping[str, Any] = field(default_factory=dict)

    def reached(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None or not isinstance(self.value, int | float):
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass(frozen=True)
class Probe:
    """What a section is told: where to write, whether to run at toy size on the CPU, and its own name."""

    section: str
    out: Path
    work: Path
    dry: bool
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def add(self, name: str, ok: bool, value: float | str | None = None, unit: str = "", **detail: Any) -> None:
        """Append one result and force it to disk: a machine that goes away takes nothing with it."""
        self._append(name, Figure(value, unit, ok=ok, detail=detail))

    def figure(self, name: str, measure: Callable[[], Figure]) -> dict[str, Any] | None:
        """The row of a figure: an earlier one, or measured now. An error becomes a row, and None: what comes after it
        may still work."""
        if (row := self.known(name)) is not None:
            return row
        start = time.monotonic()
        try:
            found = measure()
        except Exception as error:
            self._append(name, failure(error), time.monotonic() - start)
            return None
        return self._append(name, found, time.monotonic() - start)

    def known(self, name: str) -> dict[str, Any] | None:
        """The row of a figure that an earlier call of the same commit, hardware and options has well measured."""
        rows = known_rows(self.out, self.about)
        return next((row for row in rows if (row["section"], row["name"]) == (self.section, name)), None)

    def _append(self, name: str, found: Figure, seconds: float | None = None) -> dict[str, Any]:
        row = {"section": self.section, "name": name, "ok": found.ok, "value": found.value, "unit": found.unit}
        if found.target is not None and not self.dry:  # toy sizes reach no target
            row |= {"target": found.target, "at_most": found.at_most, "reached": found.reached()}
        row |= {"detail": dict(found.detail)} | ({} if seconds is None else {"seconds": round(seconds, 1)})
        append(self.out, {**row, **self.about})
        return row


def failure(error: Exception) -> Figure:
    """An error as a row: its first line, the innermost line of code, its text."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    first_line = (str(error).strip().splitlines() or [""])[0]
    detail = {"where": f"{Path(last.filename).name}:{last.lineno}", "text": str(error)[-2000:]}
    return Figure(f"{type(error).__name__}: {first_line[:160]}", ok=False, detail=detail)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One JSON line, flushed to disk; lines of several processes do not mix."""
    line = json.dumps({"time": round(time.time(), 1), **row}, ensure_ascii=False, default=str) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> list[dict[str, Any]]:
    """Every complete row of a file; none if it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def known_rows(path: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that need not be measured again. None of a tree that no commit describes."""
    commit = str(about.get("commit", "unknown"))
    if commit == "unknown" or commit.endswith("+changes"):
        return []
    asked = json.loads(json.dumps({name: about.get(name) for name in IDENTITY}, default=str))
    return [row for row in read(path) if row["ok"] and {name: row.get(name) for name in IDENTITY} == asked]


def run_section(section: str, run: Callable[[Probe], None]) -> None:
    """Command line of a section; an error becomes a row before it ends the process."""
    parser = argparse.ArgumentParser(description=section)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    about = json.loads((options.work / ABOUT).read_text(encoding="utf-8"))
    probe = Probe(section, options.out, options.work, options.dry, about)
    try:
        run(probe)
    except Exception as error:
        found = failure(error)
        probe.add("error", False, found.value, **found.detail)
        raise


@contextlib.contextmanager
def one_at_a_time(probe: Probe, name: str) -> Iterator[Path]:
    """The folder ``name``, while no other section makes it."""
    probe.work.mkdir(parents=True, exist_ok=True)
    with (probe.work / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield probe.work / name


def world(probe: Probe) -> Path:
    """The generated sign corpus, its shards and its tokenizer; made once, by whoever comes first."""
    from pipeline.demo.data import prepare
    from pipeline.demo.settings import DemoSize

    if not probe.dry:
        size = DemoSize(train=64, dev=8, test=8, test_signer=4, text_train=800, text_dev=40)
    else:
        size = DemoSize(train=16, dev=4, test=4, test_signer=2, text_train=120, text_dev=20)
    with one_at_a_time(probe, "world") as folder:
        prepare(folder, size, seed=0, workers=1 if probe.dry else 8)
    return folder


def shown(rows: Sequence[Mapping[str, Any]], most: int) -> list[str]:
    """At most ``most`` lines: failures first, then missed targets, then one line per result, cut where too many."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["ok"], row.get("reached") is not False)):
        value = row.get("value")
        text = f"{value:.4g}" if isinstance(value, float) else ("" if value is None else str(value))
        unit = f" {row['unit']}" if row.get("unit") else ""
        sign = "<=" if row.get("at_most") else ">="
        target = f", target {sign} {row['target']:g}" if row.get("target") is not None else ""
        seconds = f" ({row['seconds']} s)" if "seconds" in row else ""
        mark = "FAILED" if not row["ok"] else ("MISSED" if row.get("reached") is False else "ok    ")
        lines.append(f"{mark} {row['section']:<11} {row['name']}: {text}{unit}{target}{seconds}"[:180])
    if len(lines) > most - 1:
        lines = [*lines[: most - 2], f"... and {len(lines) - (most - 2)} more results that are well, in the file"]
    failed, missed = sum(not row["ok"] for row in rows), sum(row.get("reached") is False for row in rows)
    return [*lines, f"{len(rows)} results, {failed} failed, {missed} targets missed"]
