"""Drills on simulated hosts: the launch says what happened, nothing is left, no sample is lost, the losses are equal.

The table is `tests/multinode/drills.py`; `make drills` runs all of it and writes the receipt.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import ledger
from tests.jobs import rows
from tests.multinode.cluster import Cluster
from tests.multinode.drill_runner import run
from tests.multinode.drills import DRILLS, Drill

pytestmark = pytest.mark.multinode


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
