"""Time and peak memory of the contrastive loss, against open_clip's ClipLoss and against all similarities at once.

    python benchmarks/contrastive_loss.py [--quick] [--out FILE]

Every figure is forward and backward in a process of its own with one thread: the best of the runs, and the peak above
features and their gradients. The sides take turns, and seconds are of the processor. ``ClipLoss`` comes from the
peers' environment (benchmarks/peers/environment.py); the token-level peer is the definition in
tests/contrast_reference.py, which is how the loss was computed before it was tiled. The growth is that of one rank
that keeps its 1,024 samples while the global batch grows around it: of its whole process, which holds no model here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from peers import environment
from receipt import ROOT, Claim, write_receipt

SIDE = Path(__file__).resolve().parent / "peers" / "contrastive_side.py"
WIDTH, TOKEN_WIDTH, OWN = 256, 128, 1024
LIMIT_GROWTH = 1.1


def figure(side: str, **options: Any) -> dict[str, Any]:
    """One side, measured. Raises Absent without open_clip."""
    python = environment.folder() / "bin" / "python" if side == "open_clip" else Path(sys.executable)
    if not python.exists():
        raise environment.Absent(f"no environment at {environment.folder()}: python benchmarks/peers/environment.py")
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(python), str(SIDE), side, json.dumps(options)], capture_output=True, text=True, cwd=ROOT, env=variables
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if not answers:
        raise environment.Absent((done.stderr.strip().splitlines() or ["nothing printed"])[-1])
    found: dict[str, Any] = json.loads(answers[-1].removeprefix("ANSWER "))
    return found


def compare(name: str, sides: tuple[str, str], options: dict[str, Any], rounds: int) -> list[Claim]:
    """Seconds and peak of ours and the peer's; sides take turns."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            found[side].append(figure(side, **options))
    ours, peer = ({key: min(run[key] for run in found[side]) for key in ("seconds", "mib", "loss")} for side in sides)
    assert abs(ours["loss"] - peer["loss"]) < 1e-3 * abs(peer["loss"]), "both must compute the same loss"
    detail = {"options": options, "loss": [ours["loss"], peer["loss"]], "runs": found}
    rows = []
    for key, unit, target in (("seconds", "s", 1.0), ("mib", "MiB", 1.0)):
        what = "CPU seconds" if key == "seconds" else "peak"
        text = f"{name}, batch {options['batch']}: {what} of forward and backward"
        ratio = peer[key] / max(ours[key], 1e-9)
        rows.append(
            Claim(text, ours[key], peer[key], ratio, target, unit, rounds, higher_is_better=False, detail=detail)
        )
    return rows


def growth(batches: list[int], runs: int) -> Claim:
    """Peak of one rank's loss in a large global batch over that in a small one."""
    peaks = [figure("ours", batch=OWN, width=WIDTH, ranks=batch // OWN, runs=runs)["process_mib"] for batch in batches]
    text = f"peak memory of a rank with {OWN} samples, global batch {batches[-1]} over {batches[0]}"
    detail = {"peaks_mib": dict(zip(map(str, batches), peaks, strict=True))}
    return Claim(text, peaks[-1] / peaks[0], None, None, LIMIT_GROWTH, "x", runs, higher_is_better=False, detail=detail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small batches, one round: finds errors, no figures")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    sentence_batches = [512] if options.quick else [1024, 4096, 16384]
    token_batches = [32] if options.quick else [64, 256]
    rounds = 1 if options.quick else 3
    rows: list[Claim] = []
    try:
        for batch in sentence_batches:
            sized = {"batch": batch, "width": WIDTH, "runs": 2}
            rows += compare("sentences against ClipLoss", ("ours", "open_clip"), sized, rounds)
    except environment.Absent as reason:
        print(f"open_clip: not measured: {reason}")
    for batch in token_batches:
        sized = {"batch": batch, "width": TOKEN_WIDTH, "runs": 2}
        rows += compare("tokens against padded ones", ("ours_tokens", "padded"), sized, rounds)
    rows.append(growth([OWN, 2 * OWN] if options.quick else [OWN, 4 * OWN, 16 * OWN], 2))
    write_receipt(rows, options.out, ("torch",))


if __name__ == "__main__":
    main()
