"""The planner's peak of a whole training run of every stage against all tensors that the run held at once, on the
CPU: states, activations, loss and buckets together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.options import free_port
from tests.source_tree import ROOT

pytestmark = pytest.mark.multiproc

TOLERANCE = 0.15


@pytest.mark.parametrize(("stage", "zero"), [("continued_pretraining", 3), ("contrastive", 2), ("connector", 1)])
def test_a_run_holds_what_was_planned(stage: str, zero: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.memory_run", stage, str(zero), "cpu", str(tmp_path), str(free_port())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert abs(found["planned"] / found["measured"] - 1) <= TOLERANCE, found
