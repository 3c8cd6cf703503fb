"""The GPU benchmarks run on the CPU at toy size, so that a GPU's few minutes are not lost on a typing error."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import run_all as program
from benchmarks.gpu.rows import Figure, Probe, append, known_rows, read, shown
from tests.source_tree import ROOT

pytestmark = pytest.mark.multiproc


ABOUT_ROWS = {"commit": "abc", "hardware": {"cpu": "made up"}, "versions": {}, "options": {"dry": True}}


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "run_all.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=520)


def test_every_section_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = run_program("--dry", "--out", str(out), "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(out)
    assert {row["commit"] for row in rows} == {"abc"} and all(row["hardware"]["cores"] for row in rows)
    ended = {row["section"] for row in rows if row["name"] == program.END}
    assert ended == {section.name for section in program.SECTIONS}
    by_name = {f"{row['section']} {row['name']}": row for row in rows}
    assert by_name["stages continued_pretraining zero3 losses"]["detail"]["losses"]
    assert by_name["stages connector zero3 killed, resumed"]["detail"]["bit_equal"]
    assert by_name["steps contrastive zero1 host synchronisations a step"]["detail"]["by_line"]
    for loop in ("our trainer", "bare DeepSpeed loop", "plain PyTorch", "Hugging Face Trainer"):
        assert by_name[f"llm toy zero1, {loop}"]["value"] > 0
    for name in ("stage 2, LoRA on the tower, live video", "stage 3, stored features", "stage 3, generation"):
        assert by_name[f"video {name}"]["value"] > 0
    assert by_name["checkpoint stall of one checkpoint"]["detail"]["gib"] > 0
    lines = done.stdout.splitlines()
    assert len(lines) <= program.SUMMARY_LINES
    assert lines[-1].startswith(f"{len(rows)} results, 0 failed, 0 targets missed in ")

    again = run_program("--dry", "--out", str(out), "--commit", "abc")
    assert again.returncode == 0 and len(read(out)) == len(rows), "a second call measures nothing twice"
    assert again.stdout.startswith("0 results, 0 failed, 0 targets missed in ")


def plan_of(folder: Path, deadline: float) -> program.Plan:
    return program.Plan(folder / "rows.jsonl", folder, False, deadline, ABOUT_ROWS)


def test_a_section_is_stopped_after_its_time_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together with what it started; later sections still run."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    monkeypatch.setattr(program.Plan, "command", lambda plan, section: [sys.executable, "-c", child])
    plan = plan_of(tmp_path, time.monotonic() + 100)
    start = time.monotonic()
    plan.run(program.Section("attention", 6))
    assert time.monotonic() - start < 30
    (row,) = read(plan.out)
    assert (row["section"], row["ok"], row["value"]) == ("attention", False, "stopped after its 6 s")
    plan_of(tmp_path, time.monotonic()).run(program.Section("llm", 6))
    assert read(plan.out)[1]["value"] == "no time was left"


def probe_of(folder: Path, dry: bool = True, **about: object) -> Probe:
    return Probe("llm", folder / "rows.jsonl", folder, dry, {**ABOUT_ROWS, **about})


def test_a_figure_is_measured_once_per_commit_and_hardware(tmp_path: Path) -> None:
    """One that failed is measured again, and so is everything in a tree that no commit describes."""
    calls: list[str] = []

    def measure(name: str, value: float = 1.0) -> Figure:
        calls.append(name)
        if name == "fails":
            raise ValueError("no such kernel")
        return Figure(value, "tokens/s")

    for about in ({}, {}, {"commit": "def"}, {"hardware": {"cpu": "another"}}, {"commit": "abc+changes"}):
        for name in ("works", "fails"):
            probe_of(tmp_path, **about).figure(name, lambda name=name: measure(name))
    assert calls == ["works", "fails", "fails", *["works", "fails"] * 3]
    assert probe_of(tmp_path, commit="abc+changes").figure("works", lambda: measure("works")) is not None
    failed = next(row for row in read(tmp_path / "rows.jsonl") if row["name"] == "fails")
    assert (failed["ok"], failed["value"]) == (False, "ValueError: no such kernel")
    assert failed["detail"]["where"].startswith("test_gpu_run_all.py:")
    assert probe_of(tmp_path).known("fails") is None
    assert known_rows(tmp_path / "rows.jsonl", {}) == []


def test_a_section_with_a_failed_figure_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, time.monotonic() + 100)
    failed = f"from benchmarks.gpu.rows import *; append(Path({str(plan.out)!r}), {{'section': 'llm', 'ok': False}})"
    programs = iter([failed, "0"])
    monkeypatch.setattr(program.Plan, "command", lambda plan, section: [sys.executable, "-c", next(programs)])
    for _ in range(3):
        plan.run(program.Section("llm", 60))
    assert [row.get("name") for row in read(plan.out)] == [None, "end with failures", "end"]


def test_a_missed_target_is_marked_and_no_failure(tmp_path: Path) -> None:
    probe = probe_of(tmp_path, dry=False)
    probe.figure("fast enough", lambda: Figure(61.0, "tokens/s", 60.0))
    probe.figure("too slow", lambda: Figure(59.0, "tokens/s", 60.0))
    probe.figure("too large", lambda: Figure(1.2, "x", 1.1, at_most=True))
    rows = read(tmp_path / "rows.jsonl")
    assert [(row["ok"], row["reached"]) for row in rows] == [(True, True), (True, False), (True, False)]
    lines = shown(rows, 10)
    assert lines[0].startswith("MISSED llm         too slow: 59 tokens/s, target >= 60")
    assert lines[1].startswith("MISSED llm         too large: 1.2 x, target <= 1.1")
    assert lines[-1] == "3 results, 0 failed, 2 targets missed"
    probe_of(tmp_path).figure("toy", lambda: Figure(1.0, "tokens/s", 60.0))
    assert "target" not in read(tmp_path / "rows.jsonl")[-1], "toy sizes have no target"


def test_what_was_cut_off_is_no_row(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    append(out, {"section": "a", "name": "b", "ok": True})
    with out.open("a") as file:
        file.write('{"section": "a", "na')
    assert [row["name"] for row in read(out)] == ["b"]
    assert read(tmp_path / "absent.jsonl") == []


def test_summary_shows_failures_first_and_stays_short() -> None:
    rows = [{"section": "stages", "name": f"row {n}", "ok": n != 70, "value": n / 3, "unit": "rel"} for n in range(80)]
    lines = shown(rows, 40)
    assert len(lines) == 40
    assert lines[0] == "FAILED stages      row 70: 23.33 rel"
    assert lines[-2:] == [
        "... and 42 more results that are well, in the file",
        "80 results, 1 failed, 0 targets missed",
    ]


def test_errors_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match="error: no section stage; there are environment, attention, attention_speed, "
    ):
        program.chosen("stage", "")
    assert [section.name for section in program.chosen("llm,attention", "llm")] == ["attention"]


def test_few_sections_may_take_longer() -> None:
    assert program.spare(program.chosen("", ""), 8) == 1.0
    assert program.spare(program.chosen("attention,attention_speed", ""), 6) == 4.0
