"""The suite is the same in every process and at every time: workers that collect other tests than each other stop."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.source_tree import ROOT


def collecting(hash_seed: int, temporary: Path) -> subprocess.Popen[str]:
    """A process that lists every test, with its own order of sets and its own folder for temporary files."""
    temporary.mkdir()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    return subprocess.Popen(
        [*command, str(ROOT / "tests")],
        cwd=ROOT,
        env={**inherited, "PYTHONHASHSEED": str(hash_seed), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_every_process_collects_the_same_tests(tmp_path: Path) -> None:
    first = collecting(1, tmp_path / "first")
    time.sleep(1.1)  # the clock must show another second when the other process imports the same module
    second = collecting(2, tmp_path / "second")
    listed = []
    for process in (first, second):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
        listed.append([line for line in output.splitlines() if "::" in line])
    assert len(listed[0]) > 1000
    assert listed[0] == listed[1]
    collected = {line.partition("::")[0] for line in listed[0]}
    on_disk = {file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("test_*.py")}
    assert on_disk == collected, "pytest passes over these files"
