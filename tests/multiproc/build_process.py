"""A build in a process of its own, for the tests that kill it. Not a test."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.source_tree import ROOT

SCRIPT = """
import pathlib, sys, time
sys.path.insert(0, {root!r})
from shards.build.build import BuildOptions, build
from tests.unit.shards.making import stored_corpus
if __name__ == "__main__":
    videos, out = map(pathlib.Path, sys.argv[1:])
    build(stored_corpus(videos), out, BuildOptions(samples_per_shard=3), 2, lambda _: time.sleep(0.02))
"""


def start_build(videos: Path, out: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start a build of the videos of a folder, three to a shard, with two workers."""
    script = folder / "build.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    return subprocess.Popen([sys.executable, str(script), str(videos), str(out)], start_new_session=True)


def kill_in_shard(process: subprocess.Popen[bytes], work: Path, shard: str, rng: random.Random) -> bool:
    """Kill -9 while the tar of ``shard`` is being written or soon after; whether the process was still alive."""
    deadline = time.monotonic() + 60
    while not list(work.glob(f"writing-*/{shard}.tmp")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(rng.random() * 0.08)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL
