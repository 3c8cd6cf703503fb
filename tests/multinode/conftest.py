"""The simulated hosts, once per test session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import World, rows, run_job
from tests.multinode.cluster import STAGE, STEPS, Cluster
from tests.multinode.drill_runner import SETTINGS, data_settings
from tests.multinode.hosts import SimulatedHost, three_hosts, why_not

Hosts = tuple[SimulatedHost, SimulatedHost, SimulatedHost]


@pytest.fixture(scope="session")
def cluster_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """``host-a``, ``host-b`` and ``host-c``; skips where the machine cannot simulate them."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with three_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def hosts(cluster_hosts: Hosts) -> tuple[SimulatedHost, SimulatedHost]:
    """``host-a`` and ``host-b``."""
    a, b, _ = cluster_hosts
    return a, b


@pytest.fixture(scope="session")
def undisturbed(cluster_hosts: Hosts, corpus: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of two ranks on one host, left alone."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    run_job(STAGE, corpus.sets(STAGE, run_dir, 2, **SETTINGS, **data_settings(corpus)), 2)
    return run_dir


@pytest.fixture(scope="session")
def local(cluster_hosts: Hosts, corpus: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses per step of two ranks on one host, for launches of `STEPS` steps."""
    run_dir = tmp_path_factory.mktemp("local")
    run_job(STAGE, corpus.sets(STAGE, run_dir, 2, train__steps=STEPS), 2)
    return rows(run_dir)


@pytest.fixture
def cluster(cluster_hosts: Hosts, corpus: World, tmp_path: Path) -> Iterator[Cluster]:
    """A folder, and the hosts that see it; its launches train as the undisturbed run did."""
    yield Cluster(cluster_hosts, corpus, tmp_path, {**SETTINGS, **data_settings(corpus)})
    for host in cluster_hosts:
        host.clear()
        host.switch_on()
