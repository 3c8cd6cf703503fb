"""Runs inside the environment of one side: ``worker.py SIDE ACTION JSON`` prints one answer line.

Actions: ``prepare`` converts our tars to the side's own format, ``throughput`` measures a stream, ``resume`` measures
the way back to the middle of an epoch.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from measure import windows

ANSWER = "ANSWER "


def main() -> None:
    side, action, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    module = importlib.import_module(f"{side}_peer")
    answer: dict[str, Any] = {}
    if action == "prepare":
        module.prepare(Path(arguments["source"]), Path(arguments["out"]), arguments["kind"])
    elif action == "throughput":
        workers = arguments["workers"]
        stream = module.stream(Path(arguments["folder"]), arguments["kind"], workers, arguments["shuffle"])
        answer = windows(stream, workers, arguments["samples"], arguments["runs"])
    elif action == "resume":
        answer = module.resume(Path(arguments["folder"]), arguments["consumed"], arguments["batch"])
    else:
        raise SystemExit(f"unknown action {action}")
    print(ANSWER + json.dumps(answer), flush=True)
    os._exit(0)  # some libraries wait for their threads or workers for ever


if __name__ == "__main__":
    main()
