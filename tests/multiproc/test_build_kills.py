"""Builds killed with kill -9 at random moments continue to the same bytes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from shards.build.build import BuildOptions, build
from tests.multiproc.build_process import kill_in_shard, start_build
from tests.unit.shards.making import stored_corpus, video_corpus

pytestmark = pytest.mark.multiproc
SMALL = BuildOptions(samples_per_shard=3)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_kill_9_at_random_moments_then_the_same_bytes(tmp_path: Path) -> None:
    videos, out, work = tmp_path / "videos", tmp_path / "set", tmp_path / ".set.building"
    video_corpus(videos, 12)
    build(stored_corpus(videos), tmp_path / "whole", SMALL)
    rng, kills = random.Random(4), 0
    for shard in (0, 1, 3):
        process = start_build(videos, out, tmp_path)
        kills += kill_in_shard(process, work, f"train-00000{shard}.tar", rng)
        assert not out.exists(), "a killed build must not leave a result under its final name"
    assert kills == 3
    finished = sorted(path.name for path in (work / "parts").iterdir())
    assert "train-000000.tar.json" in finished, "nothing was kept"
    build(stored_corpus(videos), out, SMALL)
    assert content(out) == content(tmp_path / "whole")
    assert not work.exists()
