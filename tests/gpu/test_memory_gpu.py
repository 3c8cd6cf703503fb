"""The planner's peak of every stage against what the device's allocator counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import ROOT

pytestmark = pytest.mark.gpu

TOLERANCE = 0.15


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("stage", ["continued_pretraining", "contrastive", "connector"])
def test_the_planned_peak_is_the_allocated_one(stage: str, zero: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.memory_run", stage, str(zero), "cuda", str(tmp_path), "29671"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert abs(found["planned"] / found["measured"] - 1) <= TOLERANCE, found
