"""``python -m launch.checks QUESTIONS`` on a host: prints the answers of all checks on one line."""

from __future__ import annotations

import json
import sys

from launch.checks import CHECKS, READY


def main(arguments: list[str]) -> int:
    """Print READY and the answers as JSON (ASCII: a path may hold bytes that are not text)."""
    questions = json.loads(arguments[0])
    answers = {check.name: check.look(questions[check.name]) for check in CHECKS}
    sys.stdout.write(f"{READY} {json.dumps(answers)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
