"""The simulated hosts, once per test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.multinode.hosts import SimulatedHost, three_hosts, why_not


@pytest.fixture(scope="session")
def cluster_hosts(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[SimulatedHost, SimulatedHost, SimulatedHost]]:
    """``host-a``, ``host-b`` and ``host-c``; skips where the machine cannot simulate them."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with three_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def hosts(
    cluster_hosts: tuple[SimulatedHost, SimulatedHost, SimulatedHost],
) -> tuple[SimulatedHost, SimulatedHost]:
    """``host-a`` and ``host-b``."""
    a, b, _ = cluster_hosts
    return a, b
