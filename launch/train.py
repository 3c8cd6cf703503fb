"""The program of every rank: ``deepspeed --hostfile hosts launch/train.py recipe.yaml [--set a.b=c ...]``."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from functools import partial
from pathlib import Path


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run one rank of one training stage.")
    parser.add_argument("recipe", help="recipe YAML, or the launcher's recipe.resolved.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--sha256", help="of the launcher's recipe.resolved.yaml, which is used as it is")
    parser.add_argument("--local_rank", type=int, default=None, help="passed by the deepspeed launcher")
    options = parser.parse_args(arguments)
    if options.sha256 and options.sets:
        parser.error("--set cannot be combined with --sha256: the launcher has resolved the recipe")
    return options


def run_rank(recipe: str, sets: list[str], sha256: str | None = None) -> int:
    """Train on this rank; returns its exit code. A signal is honoured before torch is imported, which takes seconds.

    Args:
        recipe: a recipe that rank 0 resolves, or with ``sha256`` the file that the launcher wrote.
        sets: overrides, ``a.b=c``.
        sha256: of the launcher's file.
    """
    from launch.notes import tell, this_rank

    try:
        return _run_rank(recipe, sets, sha256)
    except Exception:  # such as an import that fails on this host: what trains reports its errors itself
        tell({"rank": this_rank(), "code": 1, "error": traceback.format_exc(), "stopped": ""})
        raise


def _run_rank(recipe: str, sets: list[str], sha256: str | None) -> int:
    from launch.heartbeat import Heartbeat
    from launch.notes import leave_before_first_step, tell, tell_begun, this_rank
    from pipeline.engine.phases import Phases
    from pipeline.engine.signals import StopFlag

    phases = Phases()
    with StopFlag(leave_before_first_step, tell_begun) as stop, Heartbeat(phases) as heartbeat:
        from launch.lock import hold_as_rank, keep_fresh
        from launch.stacks import write_on_signal
        from pipeline.config.recipe_file import RecipeFile
        from pipeline.engine.recipe import Unresolved
        from pipeline.engine.run import Launcher
        from pipeline.engine.run import main as run

        if sha256 is not None:
            file = RecipeFile(Path(recipe), sha256)
            with write_on_signal(file.run_dir / "logs", this_rank()):
                return run(file, stop, Launcher(tell, keep_fresh, phases))
        guard = partial(hold_as_rank, entered=heartbeat.obey_requests_in)
        return run(Unresolved(recipe, tuple(sets)), stop, Launcher(tell, guard, phases))


def main() -> int:
    options = parse(sys.argv[1:])
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    # run as a script, this folder is on the path instead of the project
    sys.path = [
        entry for entry in sys.path if os.path.abspath(entry or ".") != os.path.dirname(os.path.abspath(__file__))
    ]
    from launch.environment import set_defaults

    set_defaults()
    return run_rank(options.recipe, options.sets, options.sha256)


if __name__ == "__main__":
    sys.exit(main())
