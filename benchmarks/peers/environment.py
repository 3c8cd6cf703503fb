"""The environment the peers live in, and running one of them there.

    python benchmarks/peers/environment.py [FOLDER]

creates it (about two minutes). Benchmarks look for it at ``SLT_PEERS`` or ``.peers`` in the repository; a peer that is
not there is reported as not measured, with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PEERS = ("webdataset", "wids", "energon", "mosaicml", "litdata")
PACKAGES = {"energon": "megatron-energon", "mosaicml": "mosaicml-streaming"}
WITHOUT_DEPENDENCIES = ("open_clip_torch==3.3.0",)
"""Only its loss is measured, which needs torch alone."""
OURS = ("ours", "unchecked")
ANSWER = "ANSWER "
"""What the last line of a measuring process begins with; everything else it prints is noise of the libraries."""


class Absent(Exception):
    """A peer cannot be measured here; the message says why."""


def folder() -> Path:
    """Where the environment is, or would be."""
    return Path(os.environ.get("SLT_PEERS", ROOT / ".peers"))


def ask(peer: str, action: str, arguments: dict[str, Any], timeout: float = 120.0) -> dict[str, Any]:
    """Run one action of a peer (or of a side of ours) in a process of its own and return its answer.

    Raises:
        Absent: the environment or the library is missing, or the run failed; with the last line of its errors.
    """
    python = Path(sys.executable) if peer in OURS else folder() / "bin" / "python"
    if not python.exists():
        raise Absent(f"no environment at {folder()}: python benchmarks/peers/environment.py")
    command = [str(python), str(HERE / "worker.py"), peer, action, json.dumps(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Files, not pipes: a worker that a library leaves behind would keep a pipe open for ever.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Absent(f"still running after {timeout:.0f} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = []
        for handle in (output, errors):
            handle.seek(0)
            texts.append([line for line in handle.read().splitlines() if line.strip()])
    answers = [line for line in texts[0] if line.startswith(ANSWER)]
    if status or not answers:
        raise Absent(f"exit status {status}: {texts[1][-1][:300] if texts[1] else 'nothing printed'}")
    found: dict[str, Any] = json.loads(answers[-1].removeprefix(ANSWER))
    return found


VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = "not installed"
print(json.dumps(found))
"""


@functools.cache
def versions() -> dict[str, str]:
    """Installed version of every peer; empty without an environment."""
    python = folder() / "bin" / "python"
    if not python.exists():
        return {}
    names = [PACKAGES.get(peer, peer) for peer in PEERS]
    done = subprocess.run([str(python), "-c", VERSIONS, *names], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def create(where: Path) -> None:
    """Create or complete the environment."""
    python = where / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(where)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "-r", str(HERE / "requirements.txt")], check=True)
    subprocess.run([*pip, "install", "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
    subprocess.run([*pip, "uninstall", "--yes", "torchvision"], check=True)


if __name__ == "__main__":
    create(Path(sys.argv[1]) if len(sys.argv) > 1 else folder())
