"""The demo as a newcomer runs it, in half its size: three stages on real DeepSpeed processes must reach their floors.

The floors of the whole demo are in its receipt, benchmarks/receipts/demo.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.end_to_end


def test_demo_reaches_its_floors(tmp_path: Path) -> None:
    """`slt demo` from nothing: perplexity falls, retrieval beats chance, unseen sentences are translated."""
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "launch", "demo", "--size", "ablation", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    (tmp_path / "demo.log").write_text(result.stdout + result.stderr)  # kept by pytest: what a newcomer would see
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    report = json.loads((out / "report.json").read_text())
    assert report["perplexity_after"] < 0.05 * report["perplexity_before"]
    assert report["retrieval_r1"] >= 20 * report["retrieval_r1_chance"]
    assert report["bleu4"] >= 8
    assert report["bleu4_unseen_signer"] >= 6
    assert len(report["translations"]) == 3
    assert report["versions"]["torch"] and report["commit"] != ""
    assert set(report["seconds"]) >= {"data", "continued_pretraining", "contrastive", "connector", "total"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "unseen sentences" in result.stdout and "BLEU signature: nrefs:1" in result.stdout
    for stage in ("continued_pretraining", "contrastive", "connector"):
        assert (out / stage / "export" / "provenance.json").is_file()
    video = next((out / "corpus" / "videos").glob("test-*.mp4"))
    export_dir = str(out / "connector" / "export")
    command = [sys.executable, "-m", "launch", "translate", str(video), "--model", export_dir, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)
