"""Drills on simulated hosts: the launch says what happened, nothing is left, no sample is lost, the losses are equal.

The table is `tests/multinode/drills.py`; `make drills` runs all of it and writes the receipt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ledger
from tests.jobs import World, rows, run_job
from tests.multinode.cluster import STAGE, Cluster
from tests.multinode.drill_runner import SETTINGS, data_settings, run
from tests.multinode.drills import DRILLS, Drill
from tests.multinode.hosts import SimulatedHost

pytestmark = pytest.mark.multinode

Hosts = tuple[SimulatedHost, SimulatedHost, SimulatedHost]


@pytest.fixture(scope="module")
def undisturbed(cluster_hosts: Hosts, corpus: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the same run on two ranks of one host, left alone."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    run_job(STAGE, corpus.sets(STAGE, run_dir, 2, **SETTINGS, **data_settings(corpus)), 2)
    return run_dir


@pytest.fixture
def cluster(cluster_hosts: Hosts, corpus: World, tmp_path: Path) -> Iterator[Cluster]:
    yield Cluster(cluster_hosts, corpus, tmp_path, {**SETTINGS, **data_settings(corpus)})
    for host in cluster_hosts:
        host.switch_on()


@pytest.mark.parametrize("drill", [drill for drill in DRILLS if drill.in_ci], ids=lambda drill: drill.name)
def test_drill(drill: Drill, cluster: Cluster, undisturbed: Path) -> None:
    result = run(drill, cluster, rows(undisturbed))
    assert not result.problems(drill), f"{result.problems(drill)}\n{result.cause}"


def test_the_ledger_notices_what_is_lost_and_what_is_repeated(undisturbed: Path) -> None:
    whole = ledger.count(undisturbed)
    assert not whole.problems and whole.epochs > 1
    path = undisturbed / "logs" / "ledger-rank-1.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in lines[1:]))
    assert ledger.count(undisturbed).lost > 0 and ledger.count(undisturbed).repeated == 0
    path.write_text("".join(f"{line}\n" for line in [*lines, lines[0]]))
    twice = ledger.count(undisturbed)
    assert twice.lost == 0 and twice.repeated > 0 and "rank 1 wrote down the steps" in twice.order[0]
    path.write_text("".join(f"{line}\n" for line in lines))
