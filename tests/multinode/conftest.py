"""The simulated hosts, once per test session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.multinode.hosts import SimulatedHost, two_hosts, why_not


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SimulatedHost, SimulatedHost]]:
    """``host-a`` and ``host-b``; skips where the machine cannot simulate them."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as pair:
        yield pair
