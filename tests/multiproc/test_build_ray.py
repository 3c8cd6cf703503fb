"""A build on a real Ray cluster of two nodes: the same bytes as one process, also when a node dies on the way."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shards.build import engines as build_engines
from shards.build.build import BuildOptions, BuildProgress, BuildRun, build
from shards.errors import DataError
from shards.schema import Segment, VideoFile
from tests.unit.shards.making import ListCorpus, stored_corpus, video_corpus

ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'llava-slt[ray]'")
pytestmark = pytest.mark.multiproc
SMALL = BuildOptions(samples_per_shard=2)
RAY = BuildRun(workers=2, engine="ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one core each; the driver joins them."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, logging_level=logging.ERROR, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_bytes_although_a_node_dies(cluster: Any, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    video_corpus(videos, 16, frames=30)
    corpus = stored_corpus(videos)
    build(corpus, tmp_path / "one", SMALL)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    assert len(nodes) == 2
    seen: list[BuildProgress] = []

    def lose_a_node(state: BuildProgress) -> None:
        if not seen:
            cluster.remove_node(sorted(cluster.worker_nodes, key=str)[0], allow_graceful=False)
        seen.append(state)

    build(corpus, tmp_path / "set", SMALL, RAY, lose_a_node)
    assert content(tmp_path / "set") == content(tmp_path / "one")
    assert (seen[-1].done, seen[-1].total) == (16, 16) and seen[-1].seconds > 10
    assert not cluster.worker_nodes, "no node was lost"


def test_what_a_task_raises_arrives_as_it_is(cluster: Any, tmp_path: Path) -> None:
    del cluster
    items = [Segment("list", "a", "train", "text", VideoFile(tmp_path / "gone.mp4"))]
    with pytest.raises(DataError, match="1 of 1 segments cannot be used"):
        build(ListCorpus(items), tmp_path / "set", SMALL, RAY)
    video_corpus(tmp_path / "v", 10)
    parts = tmp_path / ".other.building" / "parts"

    def break_the_folder(_: BuildProgress) -> None:
        if parts.is_dir():
            shutil.rmtree(parts, ignore_errors=True)
            parts.write_text("a file where a folder must be")

    with pytest.raises(DataError, match="cannot write"):
        build(stored_corpus(tmp_path / "v"), tmp_path / "other", SMALL, RAY, break_the_folder)


def test_a_task_that_is_lost_again_and_again(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del cluster
    video_corpus(tmp_path / "v", 1)
    monkeypatch.setattr(build_engines, "_LOST_TASK_RETRIES", 0)
    monkeypatch.setattr(build_engines, "_shard_or_error", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match=r"a task was lost 1 times \(WorkerCrashedError.*\n  fix: look at"):
        build(stored_corpus(tmp_path / "v"), tmp_path / "set", SMALL, RAY)
