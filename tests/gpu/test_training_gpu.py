"""Every stage on CUDA under every ZeRO stage against the CPU; killed, resumed and exported under ZeRO-3."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import stages
from benchmarks.gpu.rows import Probe, read

pytestmark = pytest.mark.gpu


def test_every_stage_trains_resumes_exports_and_generates(tmp_path: Path) -> None:
    """What the benchmark's section finds, asserted: each result is one row."""
    out = tmp_path / "rows.jsonl"
    stages.run(Probe("stages", out, tmp_path / "work", dry=False))
    rows = read(out)
    assert [row for row in rows if not row["ok"]] == []
    asked = {f"{stage} zero{zero} losses" for stage in stages.STAGES for zero in (1, 2, 3)}
    asked |= {f"{stage} zero3 {name}" for stage in stages.STAGES for name in ("killed, resumed", "export")}
    assert {row["name"] for row in rows} == asked | {"LLM greedy tokens equal the CPU's", "slt evaluate"}
