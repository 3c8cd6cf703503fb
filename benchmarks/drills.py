"""Every drill of `tests/multinode/drills.py`, for real: three simulated hosts, sshd, pdsh, DeepSpeed's launcher.

A row per drill: what is not as it must be (0 = nothing), the exit code, the cause as the launch names it and whether
that is what was broken, the seconds from the fault to the next finished step, the ledger, the losses against the
undisturbed run. Needs root and Linux, because hosts are network namespaces.

    python benchmarks/drills.py [--quick] [--only NAME] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from receipt import ROOT, Claim, write_receipt

sys.path.insert(0, str(ROOT))
from pipeline.demo.data import prepare
from pipeline.demo.settings import SMOKE
from tests.jobs import World, rows, run_job
from tests.multinode.cluster import STAGE, Cluster
from tests.multinode.drill_runner import SETTINGS, Result, data_settings, run
from tests.multinode.drills import DRILLS, Drill
from tests.multinode.hosts import SimulatedHost, three_hosts, why_not

RESTART_SECONDS = 60.0
"""Longest time from a killed rank to the next finished step, on two cores."""


def claim(drill: Drill, result: Result) -> Claim:
    """What is wrong after a drill."""
    problems = result.problems(drill)
    detail = {**result.as_row(), "problems": problems, "hosts": drill.starts}
    return Claim(drill.name, len(problems), None, None, 0, "problems", 1, False, detail)


def summary(results: list[tuple[Drill, Result]]) -> list[Claim]:
    """What the drills say together."""
    scores = [named for _, result in results for named in result.diagnosis.values()]
    times = {drill.name: result.seconds_to_next_step for drill, result in results}
    kill = next((seconds for name, seconds in times.items() if name == "kill a rank"), None)
    found = [Claim("parts of the diagnosis that name what was broken", sum(scores), None, None, len(scores), "", 1)]
    if kill is not None:
        found.append(
            Claim("from a killed rank to the next finished step", kill, None, None, RESTART_SECONDS, "s", 1, False)
        )
    return found


def drill_all(world: World, folder: Path, names: list[str]) -> list[tuple[Drill, Result]]:
    """Run the drills of these names (all without) one after another on the same hosts."""
    settings = {**SETTINGS, **data_settings(world)}
    run_job(STAGE, world.sets(STAGE, folder / "undisturbed", 2, **settings), 2)
    reference = rows(folder / "undisturbed")
    results = []
    with three_hosts(folder / "hosts") as hosts:
        for drill in DRILLS:
            if not names or drill.name in names:
                results.append((drill, _drill(drill, Cluster(hosts, world, folder / drill.slug, settings), reference)))
    return results


def _drill(drill: Drill, cluster: Cluster, reference: dict[int, float]) -> Result:
    cluster.folder.mkdir()
    result = run(drill, cluster, reference)
    print(f"{drill.name}: {'; '.join(result.problems(drill)) or 'as it must be'}", flush=True)
    hosts: tuple[SimulatedHost, ...] = cluster.hosts
    for host in hosts:
        host.switch_on()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a killed rank and a cut link only")
    parser.add_argument("--only", action="append", default=[], help="name of a drill; may be repeated")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    options = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"drills need simulated hosts, and this machine has none: {reason}")
    names = options.only or (["kill a rank", "cut a link"] if options.quick else [])
    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        world = World(Path(scratch) / "world")
        prepare(world.root, SMOKE, seed=0, workers=1)
        results = drill_all(world, Path(scratch), names)
    found = [*(claim(drill, result) for drill, result in results), *summary(results)]
    write_receipt(found, options.out, ("torch", "deepspeed"))
    return 0 if all(row.reached for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
