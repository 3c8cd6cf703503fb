"""``python -m launch.checks QUESTIONS`` on a host: prints a line for every check, as soon as it has its answer."""

from __future__ import annotations

import json
import sys
from typing import Any

from launch.checks import CHECKS, READY
from launch.checks.base import HostCheck


def main(arguments: list[str]) -> int:
    """Print READY, the check's name and its answer as JSON (ASCII: a path may hold bytes that are not text)."""
    questions = json.loads(arguments[0])
    for check in CHECKS:
        sys.stdout.write(f"{READY} {check.name} {json.dumps(looked(check, questions[check.name]))}\n")
        sys.stdout.flush()  # the next one may wait for storage that is gone
    return 0


def looked(check: HostCheck, question: Any) -> dict[str, Any]:
    """``{"answer": ...}``, or ``{"problem": ...}`` if the check could not look."""
    try:
        return {"answer": check.look(question)}
    except Exception as error:  # whatever it is: the launcher names the host and says it
        return {"problem": f"{check.name} cannot be checked: {type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
