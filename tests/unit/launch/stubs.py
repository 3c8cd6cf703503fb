"""Stand-ins for a launcher and its ranks: plain processes that use nothing but the standard library.

``python stubs.py launcher RUN_DIR WORLD MODE`` starts WORLD ranks with RANK set and waits for them, as a real launcher
does; ``python stubs.py rank RUN_DIR MODE`` is one rank. What the modes do is in `rank` and `launcher`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def leave(run_dir: Path, code: int, error: str = "") -> None:
    """Report and leave as launch/train.py does."""
    number = int(os.environ["RANK"])
    report = {"rank": number, "code": code, "error": error}
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    (run_dir / "logs" / f"exit-rank-{number}.json").write_text(json.dumps(report))
    sys.exit(code)


def tell(run_dir: Path, report: dict[str, object]) -> None:
    """As `launch.notes.tell`, with a host's name before it where a test plays pdsh."""
    host = f"{run_dir.name}: " if run_dir.name == "host" else ""
    sys.stderr.write(f"{host}slt-rank-report: {json.dumps(report)}\n")
    sys.stderr.flush()


def rank(run_dir: Path, mode: str) -> None:
    number = int(os.environ["RANK"])
    stopped: list[int] = []
    if mode in ("save", "workers", "slow"):
        signal.signal(signal.SIGTERM, lambda n, frame: stopped.append(n))
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) if mode == "workers" else None
    sys.stdout.write(f"hello from rank {number}\n")
    sys.stdout.flush()
    if number == 0 and mode not in ("starting", "starting_and_killed"):
        tell(run_dir, {"rank": 0, "begun": True})
    (run_dir / f"ready-{number}").write_text(str(os.getpid()))
    if mode == "ok":
        leave(run_dir, 0)
    if mode == "helper":  # as a fork server that takes its time
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        leave(run_dir, 0)
    if mode == "full_disk":
        tell(run_dir, {"rank": number, "code": 2, "error": "checkpoint step-000002 could not be written"})
        sys.exit(2)
    if mode == "starting_and_killed" and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "fail" and number == 1:
        leave(run_dir, 4, "shard 3 is damaged")
    if mode == "die" and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "fail":
        leave(run_dir, 1, "connection lost")
    if mode == "fail_and_hang" and number == 0:
        leave(run_dir, 5, "loss is nan")
    while not stopped:
        time.sleep(0.02)
    if worker is not None:
        alive = worker.poll() is None
        worker.kill()
        leave(run_dir, 75 if alive else 1, "" if alive else "my worker was signalled")
    leave(run_dir, 75)


def launcher(run_dir: Path, world: int, mode: str) -> int:
    command = [sys.executable, __file__, "rank", str(run_dir), mode]
    ranks = [subprocess.Popen(command, env={**os.environ, "RANK": str(number)}) for number in range(world)]
    if mode == "stubborn_orphans":
        while not (run_dir / "ready-0").exists():
            time.sleep(0.02)
        return 1
    codes: list[int] = []
    while len(codes) < world:
        time.sleep(0.02)
        codes = [code for code in (process.poll() for process in ranks) if code is not None]
        failed = [code for code in codes if code]
        if failed and mode in ("die", "starting_and_killed"):
            for process in ranks:
                process.kill()
            return failed[0] % 256  # as the system shows a negative exit code
    return max(codes)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(Path(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(launcher(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
