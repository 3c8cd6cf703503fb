"""Two simulated hosts, one of which is not like the other: it is named, and the launch goes on without it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import EXIT_CLUSTER
from tests.jobs import World, rows
from tests.multinode.cluster import ENV, PAIR, STAGE, Cluster
from tests.multinode.hosts import PORT, SimulatedHost

pytestmark = pytest.mark.multinode

SITE = Path(sysconfig.get_paths()["purelib"])
LATE = "import time; time.time = lambda real=time.time: real() - 100\n"
# all that comes before the ranks, and nothing more; speeds of a shared machine mean nothing
TRIAL = """
import logging, sys
from pathlib import Path
from launch import health
from launch.prepare import prepare
from launch.ready import ready
from launch.run_options import RunOptions
logging.basicConfig(level=logging.INFO)
health.SLOW = 0
hostfile, port, *sets = sys.argv[1:]
options = RunOptions(recipe="demo_STAGE", hostfile=Path(hostfile), ssh_port=int(port), sets=sets, health="quick")
ready(prepare(options), options)
"""


@pytest.fixture
def cluster(hosts: tuple[SimulatedHost, SimulatedHost], corpus: World, tmp_path: Path) -> Iterator[Cluster]:
    yield Cluster(hosts, corpus, tmp_path, {"train__steps": 1})
    for host in hosts:
        host.clear()


@contextlib.contextmanager
def only_here(host: SimulatedHost, *mount: str) -> Iterator[None]:
    """A mount that one host sees, and the others do not; its target comes last."""
    subprocess.run(host.inside("mount", *mount), check=True)
    try:
        yield
    finally:
        subprocess.run(host.inside("umount", "--lazy", mount[-1]), check=True)


def test_a_host_that_is_not_like_the_other(cluster: Cluster, tmp_path: Path) -> None:
    """Another package, a clock that is late, a small disk and a shard that cannot be read."""
    metadata = next(SITE.glob("transformers-*.dist-info/METADATA"))
    version = importlib.metadata.version("transformers")
    other, late, cache = tmp_path / "METADATA", tmp_path / "late.pth", tmp_path / "cache"
    other.write_text(metadata.read_text().replace(f"Version: {version}", "Version: 0.1", 1))
    late.write_text(LATE)
    cache.mkdir()
    shard = next(cluster.world.text.glob("train-*.tar"))
    settings = {"data__cache_dir": cache, "data__cache_gib": 1}
    with contextlib.ExitStack() as stack:
        for mount in (
            ("--bind", str(other), str(metadata)),
            ("--bind", str(late), str(SITE / "distutils-precedence.pth")),
            ("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(cache)),
            ("--bind", "/proc/self/mem", str(shard)),
        ):
            stack.enter_context(only_here(cluster.b, *mount))
        code, output = cluster.finish(cluster.slt(**settings), seconds=60)
        assert code == EXIT_CLUSTER and "1 of 2 hosts cannot take part, nothing was started" in output, output
        for text in (
            f"host-b: has transformers 0.1, the others {version}; bring its checkout and environment to the state of",
            "s behind this machine's; set it by NTP",
            "host-b: has 0.0 GiB for data.cache_dir, less than data.cache_gib=1; free space, or lower it",
            f"host-b: cannot read {shard} (",
        ):
            assert output.count(text) == 1, output
        assert "host-a: " not in output and "Traceback" not in output
        assert not (cluster.run_dir / "logs" / "launch.log").exists()
        process = cluster.start(PAIR, ("--exclude-bad",), log="log", values=settings)
        code, output = cluster.finish(process)
    assert code == 0 and "--exclude-bad: going on with 1 ranks on host-a" in output, output
    assert list(rows(cluster.run_dir)) == [1]


def test_the_trial_of_two_hosts(cluster: Cluster) -> None:
    """They meet although each believes that its own name is 127.0.1.1."""
    sets = [value for value in cluster.sets() if value != "--set"]
    program = TRIAL.replace("STAGE", STAGE)
    argv = [str(Path(sysconfig.get_path("scripts")) / "python"), "-c", program, cluster.hostfile(*PAIR), str(PORT)]
    code, output = cluster.finish(cluster.a.start([*argv, *sets], cluster.folder / "log", ENV), seconds=120)
    assert code == 0 and "trial of 2 hosts: " in output and "GiB/s" in output, output
