"""What every rank runs: ``deepspeed --hostfile hosts launch/train.py recipe.yaml [--set a.b=c ...]``."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run one rank of one training stage.")
    parser.add_argument("recipe", help="recipe YAML (or a recipe.resolved.yaml)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--local_rank", type=int, default=None, help="passed by the deepspeed launcher")
    return parser.parse_args(arguments)


def run_rank(recipe: str, sets: list[str]) -> int:
    """Train on this rank; returns its exit code. A signal is honoured before torch is imported, which takes seconds."""
    from launch.notes import leave_before_first_step, tell, tell_begun
    from pipeline.engine.signals import StopFlag

    with StopFlag(leave_before_first_step, tell_begun) as stop:
        from launch.lock import accompany, hold
        from launch.plan import LAUNCH_ID
        from pipeline.engine.run import Launcher
        from pipeline.engine.run import main as run

        launch_id = os.environ.get(LAUNCH_ID)
        guard = partial(hold, launch_id="without launcher") if launch_id is None else accompany
        return run(recipe, sets, stop, Launcher(tell, guard))


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
    return run_rank(options.recipe, options.sets)


if __name__ == "__main__":
    sys.exit(main())
