"""Every stage on CUDA under every ZeRO stage against the same run on the CPU, killed and resumed, exported."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import stages
from benchmarks.gpu.rows import Probe, read

pytestmark = pytest.mark.gpu


def test_every_stage_trains_resumes_exports_and_generates(tmp_path: Path) -> None:
    """What the probe's section finds, asserted: each result is one row."""
    out = tmp_path / "rows.jsonl"
    stages.run(Probe("stages", out, tmp_path / "work", dry=False))
    rows = read(out)
    assert [row for row in rows if not row["ok"]] == []
    # per stage and ZeRO stage losses, resume and export; two rows of generation
    assert len(rows) == 3 * 3 * 3 + 2
