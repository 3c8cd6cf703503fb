"""A run of two ranks on this machine through at least thirty random faults, against the same run left alone.

Faults, drawn with a seed: a rank is killed, a rank is stopped (SIGSTOP), a rank is killed while a checkpoint is
written, the launch gets SIGTERM, a bit of the newest checkpoint is flipped before a rank is killed. `slt launch run`
restarts by itself; where it ends, the same command is started again, as a user or a scheduler would. Afterwards the
ledger must show every sample once per epoch, and every loss must be that of the undisturbed run to the last bit.

    python benchmarks/soak.py [--quick] [--faults N] [--seed N] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from receipt import ROOT, Claim, write_receipt

sys.path.insert(0, str(ROOT))
from pipeline.demo.data import prepare
from pipeline.demo.settings import SMOKE
from tests import ledger
from tests.jobs import World, rows

STAGE = "continued_pretraining"
STEPS_PER_FAULT = 12
SAVE_EVERY = 4
LAUNCH_OPTIONS = ["--restart-delay", "0", "--hang-seconds", "8", "--max-restarts", "5"]
FAULTS = ("kill", "stop", "kill while saving", "SIGTERM", "damage")


@dataclass
class Soak:
    """A run under fire."""

    world: World
    run_dir: Path
    steps: int
    options: list[str] = field(default_factory=list)
    """Of `slt launch run`."""
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    recovered: list[float] = field(default_factory=list)
    """Seconds from every fault to the next finished step."""

    def start(self) -> None:
        """The command, again and again the same."""
        slt = str(Path(sys.executable).parent / "slt")
        settings = self.world.sets(
            STAGE, self.run_dir, 2, train__steps=self.steps, train__checkpoint__every_steps=SAVE_EVERY,
            train__checkpoint__keep=4, train__sample_ledger="true", train__global_batch=16, train__micro_batch=1,
            data__eval="[]",
        )  # fmt: skip
        argv = [slt, "launch", "run", f"demo_{STAGE}", "--num-procs", "2", *self.options]
        argv += [part for text in settings for part in ("--set", text)]
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with (self.run_dir / "output").open("ab") as sink:
            self.process = subprocess.Popen(argv, env=env, cwd=ROOT, stdout=sink, stderr=sink, start_new_session=True)
        self.starts += 1

    def over(self) -> bool:
        """Whether the run has finished; a launch that ended otherwise is started again."""
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        self.codes[code] += 1
        if code == 0:
            return True
        if self.starts > 4 * self.steps // STEPS_PER_FAULT or code in (1, 2, 4, 5, 6):
            raise SystemExit(f"exit code {code}\n" + (self.run_dir / "output").read_text()[-4000:])
        self.start()
        return False

    def newest_row(self) -> tuple[int, float]:
        """Step and time of the last row of metrics."""
        with contextlib.suppress(OSError, ValueError, IndexError), (self.run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
            row = json.loads(file.read().splitlines()[-1])
            return int(row["step"]), float(row["time"])
        return 0, 0.0

    def reach(self, step: int) -> bool:
        """Wait for a step; False if the run is over before."""
        return self.until(lambda: self.newest_row()[0] >= step)

    def go_on(self, file: int) -> bool:
        """Wait for the first step after a resume, which replaces this metrics file."""
        if not self.until(lambda: self.metrics_file() not in (0, file)):
            return False
        resumed = time.time()
        return self.until(lambda: self.newest_row()[1] > resumed)

    def metrics_file(self) -> int:
        """Number of the file; 0 = none."""
        with contextlib.suppress(OSError):
            return (self.run_dir / "metrics.jsonl").stat().st_ino
        return 0

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition; False if the run is over before."""
        deadline = time.monotonic() + 180
        while not condition():
            if self.over():
                return False
            if time.monotonic() > deadline:
                raise SystemExit("no progress for three minutes\n" + (self.run_dir / "output").read_text()[-4000:])
            time.sleep(0.01)
        return True

    def ranks(self) -> list[psutil.Process]:
        """Of the present attempt."""
        assert self.process is not None
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "--sha256" in process.cmdline() and "RANK" in process.environ():
                        found.append(process)
        return found

    def trains(self) -> bool:
        """Whether all ranks were heard in a step: one that starts or saves may be silent for longer."""
        with contextlib.suppress(OSError, ValueError):
            status = json.loads((self.run_dir / "logs" / "status.json").read_text())
            phases = [rank["phase"] for host in status.get("hosts", []) for rank in host["ranks"]]
            return bool(phases) and set(phases) <= {"step", "data"}
        return False

    def saving(self) -> bool:
        """Whether a checkpoint is half written."""
        folder = self.run_dir / "checkpoints"
        return folder.is_dir() and any(path.name.startswith(".") for path in folder.iterdir())

    def complete(self) -> list[Path]:
        marks = (self.run_dir / "checkpoints").glob("step-*/COMPLETE")
        return sorted(path.parent for path in marks)


def hit(soak: Soak, kind: str, chance: random.Random) -> bool:
    """One fault; False if the run was over before."""
    ready = {"kill while saving": soak.saving, "stop": soak.trains}.get(kind)
    if ready is not None and not soak.until(ready):
        return False
    ranks = soak.ranks()
    if not ranks:  # the launch is just being restarted by itself
        return soak.until(lambda: bool(soak.ranks())) and hit(soak, kind, chance)
    victim = chance.choice(ranks)
    with contextlib.suppress(psutil.NoSuchProcess):
        if kind == "SIGTERM":
            assert soak.process is not None
            soak.process.terminate()
        elif kind == "stop":
            victim.suspend()
        else:
            if kind == "damage" and len(soak.complete()) > 1:
                damage(soak.complete()[-1], chance)
            victim.kill()
    return True


def damage(checkpoint: Path, chance: random.Random) -> None:
    """Flip one bit of one of its files."""
    path = chance.choice([path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.stat().st_size])
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def disturbed(soak: Soak, faults: int, seed: int) -> Counter[str]:
    """Run to the end through so many faults, one per `STEPS_PER_FAULT` steps; returns how many of each kind."""
    chance = random.Random(seed)
    kinds = [FAULTS[number % len(FAULTS)] for number in range(faults)]
    chance.shuffle(kinds)
    done: Counter[str] = Counter()
    soak.start()
    for number, kind in enumerate(kinds):
        if not soak.reach(number * STEPS_PER_FAULT + chance.randint(1, STEPS_PER_FAULT - 1)):
            break
        file = soak.metrics_file()
        if not hit(soak, kind, chance):
            break
        begin = time.monotonic()
        done[kind] += 1
        if soak.go_on(file):
            soak.recovered.append(time.monotonic() - begin)
        print(f"{number + 1}/{faults} {kind} at step {soak.newest_row()[0]}", flush=True)
    soak.until(lambda: False)
    return done


def claims(soak: Soak, calm: Soak, wanted: int, done: Counter[str], seconds: float) -> list[Claim]:
    count = ledger.count(soak.run_dir)
    losses, reference = rows(soak.run_dir), rows(calm.run_dir)
    difference = max(abs(losses.get(step, float("nan")) - loss) for step, loss in reference.items())
    per_step = statistics.median(rows(calm.run_dir, "perf/seconds_per_step").values())
    faults = sum(done.values())
    detail: dict[str, Any] = {
        "faults": dict(done), "starts": soak.starts, "exit_codes": {str(code): n for code, n in soak.codes.items()},
        "steps": count.steps, "epochs": count.epochs, "seconds": round(seconds),
        "seconds_to_next_step": [round(one, 1) for one in soak.recovered], "goodput": goodput_rows(soak.run_dir),
    }  # fmt: skip
    kept = per_step * soak.steps / seconds
    return [
        Claim("faults survived", faults, None, None, wanted, "", 1, detail=detail),
        Claim(f"samples lost, {faults} faults", count.lost, None, None, 0, "", 1, False),
        Claim(f"samples repeated, {faults} faults", count.repeated, None, None, 0, "", 1, False),
        Claim("steps out of place", len(count.order), None, None, 0, "", 1, False, {"steps": count.order}),
        Claim("largest difference of a loss to the undisturbed run", difference, None, None, 0, "", 1, False),
        Claim("median seconds from a fault to the next step", statistics.median(soak.recovered), None, None, 60, "s",
              len(soak.recovered), False),
        Claim("goodput with a fault per dozen steps: time of kept steps at the undisturbed pace", kept, None, None, 0,
              "", 1, detail={"seconds_per_step": per_step}),
    ]  # fmt: skip


def goodput_rows(run_dir: Path) -> list[dict[str, Any]]:
    """What the run itself says of its time, one row per attempt."""
    path = run_dir / "goodput.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five faults")
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    options = parser.parse_args()
    faults = len(FAULTS) if options.quick else options.faults
    steps = (faults + 4) * STEPS_PER_FAULT
    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        world = World(Path(scratch) / "world")
        prepare(world.root, SMOKE, seed=0, workers=1)
        calm = Soak(world, Path(scratch) / "calm", steps)
        calm.start()
        calm.until(lambda: False)
        soak = Soak(world, Path(scratch) / "soak", steps, LAUNCH_OPTIONS)
        begin = time.monotonic()
        try:
            done = disturbed(soak, faults, options.seed)
        finally:
            if soak.process is not None and soak.process.poll() is None:
                soak.process.send_signal(signal.SIGINT)
        rows_of_receipt = claims(soak, calm, faults, done, time.monotonic() - begin)
    write_receipt(rows_of_receipt, options.out, ("torch", "deepspeed"))
    return 0 if all(row.reached for row in rows_of_receipt) else 1


if __name__ == "__main__":
    sys.exit(main())
