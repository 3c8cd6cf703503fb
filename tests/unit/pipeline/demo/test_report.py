"""What the demo shows: the report, its curves, the translations beside it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pipeline.demo.report import DemoReport, draw_curves, print_report
from pipeline.demo.run import load_report, read_translations
from pipeline.demo.stages import StageRun

METRICS = {
    "continued_pretraining": ("eval/perplexity", [90.0, 12.0, 4.0]),
    "contrastive": ("eval/video_to_text/r1", [1.0, 30.0, 55.0]),
    "connector": ("eval/bleu4", [0.0, 10.0, 28.0]),
}


@pytest.fixture
def runs(tmp_path: Path) -> list[StageRun]:
    """Three finished runs: a loss at every step, an evaluation at some."""
    made = []
    for stage, (metric, values) in METRICS.items():
        rows: list[dict[str, Any]] = [{"step": step, "train/loss": 5.0 / step} for step in range(1, 21)]
        rows += [{"step": 10 * at, metric: value} for at, value in enumerate(values)]
        folder = tmp_path / stage
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(StageRun(stage, folder, folder / "export", 12.0))
    return made


def report() -> DemoReport:
    return DemoReport(
        seed=4, size="smoke", num_procs=2, perplexity_before=412.34, perplexity_after=6.789, retrieval_r1=48.75,
        retrieval_r1_chance=1.25, retrieval_candidates=80, bleu4=31.26, bleu4_unseen_signer=22.84, rouge_l=51.5,
        bleu_signature="nrefs:1|tok:13a", seconds={"connector": 64.4, "total": 300.2},
        translations=[{"id": "test/7", "reference": "Regen im Süden", "hypothesis": "Regen im Norden"}],
        versions={"torch": "2"}, commit="abc", hardware="one core",
    )  # fmt: skip


def test_the_report_on_disk_is_the_report(tmp_path: Path) -> None:
    report().write(tmp_path / "report.json")
    assert load_report(tmp_path) == dataclasses.asdict(report())
    assert "Süden" in (tmp_path / "report.json").read_text(encoding="utf-8"), "readable without decoding escapes"


def test_a_new_report_knows_what_it_ran_on() -> None:
    made = DemoReport(seed=0, size="full", num_procs=2)
    assert "torch" in made.versions and made.commit and "cores" in made.hardware


def test_the_printed_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report(), tmp_path)
    text = capsys.readouterr().out
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith("│") and line[2] != " "}
    assert "412.3" in lines["continued_pretraining"] and "6.79" in lines["continued_pretraining"]
    assert "R@1 % of 80" in lines["contrastive"] and "1.2 (chance)" in lines["contrastive"]
    assert "48.8" in lines["contrastive"] and "31.3" in lines["connector"] and "64" in lines["connector"]
    assert "22.8" in text and "BLEU signature: nrefs:1|tok:13a" in text
    assert "reference   Regen im Süden" in text and "translation Regen im Norden" in text
    assert "total 300 s" in text and str(tmp_path / "report.json") in text.replace("\n", "")


def test_curves_are_one_panel_per_stage(runs: list[StageRun], tmp_path: Path) -> None:
    assert draw_curves(runs, tmp_path / "curves.png") == f"curves {tmp_path / 'curves.png'}"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.size == (1500, 360)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    for panel in range(3):
        part = pixels[:, 500 * panel : 500 * (panel + 1)]
        for colour in ((31, 119, 180), (255, 127, 14)):  # matplotlib's C0, the loss, and C1, the held-out metric
            assert (abs(part - colour).sum(-1) < 30).sum() > 100, f"panel {panel} lacks a curve"


def test_curves_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = draw_curves([], tmp_path / "curves.png")
    assert said == "no curves: matplotlib is not installed (pip install 'llava-slt[plots]')"
    assert not (tmp_path / "curves.png").exists()


def test_translations_of_an_evaluation(tmp_path: Path) -> None:
    rows = [{"sample_id": f"s{n}", "reference": f"r{n}", "hypothesis": f"h{n}", "length": n} for n in (2, 1)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "predictions.parquet")
    assert read_translations(tmp_path) == [
        {"id": "s2", "reference": "r2", "hypothesis": "h2"}, {"id": "s1", "reference": "r1", "hypothesis": "h1"},
    ]  # fmt: skip
