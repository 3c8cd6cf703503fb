"""Command lines must start at once: run one in a fresh process and say what it imported on the way."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from tests.source_tree import ROOT

MODELS = ("torch", "deepspeed", "transformers")
"""Seconds to import, and what a login node may not have at all."""


def output_of_light_start(app: str, arguments: Sequence[str], heavy: Sequence[str]) -> str:
    """What ``arguments`` print when given to the typer app of module ``app``; fails if a ``heavy`` one is imported."""
    program = (
        f"import sys\nfrom typer.testing import CliRunner\nfrom {app} import app\n"
        f"result = CliRunner().invoke(app, {list(arguments)!r})\n"
        "assert result.exit_code == 0, result.output\n"
        f"found = sorted({set(heavy)!r} & set(sys.modules))\n"
        "assert not found, f'imported on the way: {found}'\n"
        "sys.stdout.write(result.output)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
