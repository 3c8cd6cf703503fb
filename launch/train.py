"""What every rank runs: ``deepspeed --hostfile hosts launch/train.py recipe.yaml [--set a.b=c ...]``."""

from __future__ import annotations

import argparse
import os
import sys


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run one rank of one training stage.")
    parser.add_argument("recipe", help="recipe YAML (or a recipe.resolved.yaml)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets")
    parser.add_argument("--local_rank", type=int, default=None, help="passed by the deepspeed launcher")
    return parser.parse_args(arguments)


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
    from pipeline.engine.run import main as run

    return run(options.recipe, options.sets)


if __name__ == "__main__":
    sys.exit(main())
