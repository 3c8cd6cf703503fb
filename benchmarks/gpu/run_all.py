"""What works on CUDA, and how fast, told within eight minutes.

    python benchmarks/gpu/run_all.py --out FILE [--only attention,stages] [--skip llm] [--minutes 8] [--dry]

Sections run in processes of their own, most valuable first, each within its own time. Every figure is on disk the
moment it is known, so whatever stops it loses nothing, and a second call with the same FILE goes on: what the same
commit has measured on the same hardware is not measured again. Needs no network and no data but what it makes.
`--dry` runs the same code at toy size on the CPU, two sections at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.environment import package_versions  # noqa: E402
from benchmarks.gpu.rows import ABOUT, append, known_rows, read, shown  # noqa: E402
from benchmarks.receipt import commit, hardware  # noqa: E402

SUMMARY_LINES = 60
DRY_PATIENCE = 4
"""Times a section's seconds that it may take on a CPU, which others use, too."""
END = "end"
"""Name of the row that says how a section ended."""


@dataclass(frozen=True)
class Section:
    """A module beside this file, and the most seconds it may take."""

    name: str
    seconds: int
    after: str = ""
    """A section whose files this one reads."""


SECTIONS = (
    Section("environment", 45),
    Section("attention", 45),
    Section("attention_speed", 45),
    Section("stages", 150),
    Section("llm", 240),
    Section("video", 150),
    Section("checkpoint", 60),
    Section("long_text", 90),
    Section("steps", 75, after="stages"),
)
"""In the order of their worth; together longer than the whole may take, since few need all of theirs."""


@dataclass(frozen=True)
class Plan:
    """How the sections are run."""

    out: Path
    work: Path
    dry: bool
    deadline: float
    """`time.monotonic` after which nothing runs."""
    about: Mapping[str, Any]
    """What every row says of commit, hardware, versions and options."""
    patience: float = 1.0
    """Times a section's seconds that it may take."""

    def run(self, section: Section) -> None:
        """One section within its time and what is left of the whole; how it ended becomes a row."""
        ended = {"section": section.name, "name": END, "unit": ""}
        if any((row["section"], row["name"]) == (section.name, END) for row in known_rows(self.out, self.about)):
            return
        limit = min(self.patience * section.seconds, self.deadline - time.monotonic())
        if limit < 5:
            append(self.out, {**ended, "ok": False, "value": "no time was left", **self.about})
            return
        start, log, before = time.monotonic(), self.work / f"{section.name}.log", len(read(self.out))
        with log.open("wb") as said:
            process = subprocess.Popen(
                self.command(section), cwd=ROOT, env=self.environment(), stdout=said, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            code = process.wait(limit)
            value = "ended well" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            code, value = None, f"stopped after its {limit:.0f} s"
        finally:
            stop(process)
        seconds = round(time.monotonic() - start, 1)
        detail = {} if code == 0 else {"log": log.read_text(encoding="utf-8", errors="replace")[-3000:]}
        # a figure that failed is wanted again, so the section is not done
        new = [row for row in read(self.out)[before:] if row["section"] == section.name]
        whole = code == 0 and all(row["ok"] for row in new)
        row = {**ended, "name": END if whole or code else "end with failures", "ok": code == 0, "value": value}
        append(self.out, {**row, "detail": detail, "seconds": seconds, **self.about})

    def command(self, section: Section) -> list[str]:
        options = ["--out", str(self.out), "--work", str(self.work), *(["--dry"] if self.dry else [])]
        return [sys.executable, "-m", f"benchmarks.gpu.{section.name}", *options]

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
        ours = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        ours["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "1"  # flash-attn 4 compiles for half a minute per kernel
        if self.dry:
            ours |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            ours["TORCH_COMPILE_DISABLE"] = (
                "1"  # compiling takes a C++ compiler and minutes: torch leaves layers as they are
            )
        return {**os.environ, **ours}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a section and, through their sessions, all it started that is still there."""
    import psutil

    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    if process.poll() is not None:
        return
    for member in family:
        member.kill()
    process.wait()


def run_all(sections: Sequence[Section], plan: Plan) -> None:
    """One after another, so that nothing disturbs what is timed; dry, two at a time, those that wait for one last."""
    if not plan.dry:
        for section in sections:
            plan.run(section)
        return
    with ThreadPoolExecutor(2) as pool:
        for late in (False, True):
            list(pool.map(plan.run, [section for section in sections if bool(section.after) == late]))


def chosen(only: str, skip: str) -> list[Section]:
    """The sections that were asked for; a name that is none ends the program."""
    known = [section.name for section in SECTIONS]
    wanted = [name for name in only.split(",") if name] or known
    unwanted = [name for name in skip.split(",") if name]
    unknown = sorted({*wanted, *unwanted} - set(known))
    if unknown:
        raise SystemExit(f"error: no section {', '.join(unknown)}; there are {', '.join(known)}")
    return [section for section in SECTIONS if section.name in wanted and section.name not in unwanted]


def spare(sections: Sequence[Section], minutes: float) -> float:
    """Times its seconds that each of these sections may take, where they are so few that time is left."""
    return max(1.0, 60 * minutes / max(sum(section.seconds for section in sections), 1))


def check_device() -> None:
    """Ends the program where nothing can be measured, before minutes are spent on saying so."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device; `--dry` runs the same code at toy size on the CPU")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON-lines file; rows are appended")
    parser.add_argument("--only", default="", help="sections, separated by commas")
    parser.add_argument("--skip", default="", help="sections, separated by commas")
    parser.add_argument("--minutes", type=float, default=8.0, help="most the whole may take")
    parser.add_argument("--commit", default="", help="what runs here, where the tree came without its git folder")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU: proves that the code runs")
    options = parser.parse_args()
    sections = chosen(options.only, options.skip)
    if not options.dry:
        check_device()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    before, start = len(read(options.out)), time.monotonic()
    about = {"commit": options.commit or commit(), "hardware": hardware(), "versions": package_versions()}
    about["options"] = {"dry": options.dry}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the sections' processes are ended on the way out
    with tempfile.TemporaryDirectory(prefix="gpu-run-all-", ignore_cleanup_errors=True) as work:
        (Path(work) / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        patience = DRY_PATIENCE if options.dry else spare(sections, options.minutes)
        deadline = start + 60 * options.minutes
        run_all(sections, Plan(options.out.resolve(), Path(work), options.dry, deadline, about, patience))
    rows = read(options.out)
    lines = shown(rows[before:], SUMMARY_LINES)
    known = f"; {before} rows were there before" if before else ""
    sys.stdout.write("\n".join(lines) + f" in {time.monotonic() - start:.0f} s{known}; {options.out}\n")
    return 0 if all(row["ok"] for row in rows[before:]) else 1


if __name__ == "__main__":
    sys.exit(main())
