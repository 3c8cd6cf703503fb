"""A signal that comes while the command is still importing."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, types

class Cli(types.ModuleType):
    def __getattr__(self, name):
        os.kill(os.getpid(), signal.{signal})
        return lambda: sys.exit(7)

sys.modules["launch.slt"] = Cli("launch.slt")
sys.argv = {argv}
from launch.start import main
main()
"""


def run(program: str, hangup: signal.Handlers) -> subprocess.CompletedProcess[str]:
    command = f"import signal; signal.signal(signal.SIGHUP, signal.{hangup.name})" + program
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    done = run(PROGRAM.format(signal="SIGHUP", argv=["slt", "train", "recipe"]), signal.SIG_IGN)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize(
    ("argv", "name", "code"),
    [
        (["slt", "launch", "run", "recipe"], "SIGTERM", 75),
        (["slt", "train", "recipe"], "SIGUSR1", 75),
        (["slt", "train", "recipe"], "SIGINT", 130),
        (["slt", "train", "recipe"], "SIGHUP", 75),
        (["slt", "launch", "plan", "recipe"], "SIGTERM", -15),
        (["slt"], "SIGTERM", -15),
    ],
)
def test_a_run_that_is_stopped_while_it_imports(argv: list[str], name: str, code: int) -> None:
    program = PROGRAM.format(signal=name, argv=argv)
    done = run(program, signal.SIG_DFL)
    told = f"{name}: stopped before the first step, nothing to save\n" if code > 0 else ""
    assert (done.returncode, done.stderr) == (code, told)
