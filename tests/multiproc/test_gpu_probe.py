"""The GPU probe's code runs on the CPU at toy size, so that a GPU's few minutes are not lost on a typing error."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import probe as program
from benchmarks.gpu.rows import append, read
from tests.source_tree import ROOT

pytestmark = pytest.mark.multiproc


def run_probe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "probe.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_every_section_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = run_probe("--dry", "--out", str(out), "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(out)
    assert rows[0]["value"] == "abc"
    ended = {row["section"] for row in rows if row["name"] == "end"}
    assert ended == {section.name for section in program.SECTIONS}
    by_name = {f"{row['section']} {row['name']}": row for row in rows}
    assert by_name["stages continued_pretraining zero3 losses"]["detail"]["losses"]
    assert by_name["stages connector zero3 killed, resumed"]["detail"]["bit_equal"]
    assert by_name["steps contrastive host synchronisations a step"]["detail"]["by_line"]
    lines = done.stdout.splitlines()
    assert len(lines) <= program.SUMMARY_LINES and lines[-1].startswith(f"{len(rows)} results, 0 failed in ")


def test_a_section_is_stopped_after_its_time_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together with what it started; later sections still run."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    monkeypatch.setattr(program.Plan, "command", lambda plan, section: [sys.executable, "-c", child])
    plan = program.Plan(tmp_path / "rows.jsonl", tmp_path, True, time.monotonic() + 100)
    start = time.monotonic()
    plan.run(program.Section("attention", 6))
    assert time.monotonic() - start < 30
    (row,) = read(plan.out)
    assert (row["section"], row["ok"], row["value"]) == ("attention", False, "stopped after its 6 s")
    program.Plan(plan.out, tmp_path, True, time.monotonic()).run(program.Section("llm", 6))
    assert read(plan.out)[1]["value"] == "no time was left"


def test_what_was_cut_off_is_no_row(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    append(out, {"section": "a", "name": "b", "ok": True})
    with out.open("a") as file:
        file.write('{"section": "a", "na')
    assert [row["name"] for row in read(out)] == ["b"]


def test_summary_shows_failures_first_and_stays_short() -> None:
    rows = [{"section": "stages", "name": f"row {n}", "ok": n != 70, "value": n / 3, "unit": "rel"} for n in range(80)]
    lines = program.summary(rows)
    assert len(lines) == program.SUMMARY_LINES
    assert lines[0] == "FAILED stages      row 70: 23.33 rel"
    assert lines[-2:] == ["... and 42 more results that are well, in the file", "80 results, 1 failed"]


def test_errors_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: no section stage; there are environment, attention, stages"):
        program.chosen("stage", "")
    assert [section.name for section in program.chosen("llm,attention", "llm")] == ["attention"]
