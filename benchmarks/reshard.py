"""ZeRO-3 shards for other ranks: time and peak memory of our ways and of DeepSpeed's ds_to_universal.

    python benchmarks/reshard.py [--quick] [--million 40] [--out FILE]

For 1, 2, 4 and 8 shards with weights and moments in fp32, each in a process of its own, in turns:

- the universal copy: `slt ckpt reshard` against `deepspeed.checkpoint.ds_to_universal` with one worker. Ours also
  hashes every file it has written;
- what a run does that resumes at another world size: one of three ranks reads its share straight from the shards.
  Its peer is the conversion that DeepSpeed needs before its own loading starts.

Seconds are those after all imports; memory is the largest resident set of the process (VmHWM), mapped pages included.
The copies are compared bit by bit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from receipt import ROOT, Claim, write_receipt

SHARDS = (1, 2, 4, 8)
RANKS = 3
GIGA = 10**9
TENSORS = 20


def make_shards(folder: Path, world: int, million: int) -> Path:
    """As DeepSpeed 0.19.8 leaves them: equal matrices in one parameter group."""
    import torch
    from deepspeed.runtime.zero.config import ZeroStageEnum

    tag = folder / "deepspeed"
    tag.mkdir(parents=True)
    rows = million * 1_000_000 // TENSORS // 1000
    shapes = {f"layers.{number}.weight": torch.Size([rows, 1000]) for number in range(TENSORS)}
    part = sum(-(-shape.numel() // world) for shape in shapes.values())
    model = {
        "module": {name: torch.zeros(0) for name in shapes}, "buffer_names": [], "param_shapes": [shapes],
        "shared_params": {}, "global_steps": 1, "global_samples": 8, "skipped_steps": 0, "dp_world_size": world,
        "mp_world_size": 1, "ds_version": "0.19.8", "lr_scheduler": None, "optimizer": None,
    }  # fmt: skip
    for rank in range(world):
        torch.manual_seed(rank)
        moments = {"step": torch.tensor(1.0), "exp_avg": torch.randn(part), "exp_avg_sq": torch.rand(part)}
        adam = {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "weight_decay": 0.1, "params": [0]}]}
        state = {
            "zero_stage": ZeroStageEnum.weights, "partition_count": world, "fp32_flat_groups": [torch.randn(part)],
            "optimizer_state_dict": adam,
        }  # fmt: skip
        torch.save(model, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": state}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def convert(who: str, folder: Path, out: Path) -> dict[str, float]:
    """One conversion in this process: seconds after imports, and memory before and at most."""
    from pipeline.engine.checkpoint import Checkpoint
    from pipeline.engine.elastic import share_of
    from pipeline.engine.reshard import to_universal
    from pipeline.engine.zero_layout import cut_by
    from pipeline.engine.zero_shards import KINDS, ZeroShards

    if who == "peer":
        from deepspeed.checkpoint import ds_to_universal
    before, begin = memory("VmRSS"), time.perf_counter()
    if who == "copy":
        to_universal(Checkpoint(folder, {}), out)
    elif who == "share":
        shards = ZeroShards.open(folder / "deepspeed")
        mine = cut_by([shards.layout.shapes], {"partition_count": RANKS}, 3)
        share = [share_of(shards, mine, 1, 0, kind) for kind in KINDS]
        assert sum(flat.numel() for flat in share) == mine.length(0) * len(KINDS)
    else:
        arguments = argparse.Namespace(
            input_folder=str(folder / "deepspeed"), output_folder=str(out / "deepspeed"), num_extract_workers=1,
            num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            ds_to_universal.main(arguments)
    return {"seconds": time.perf_counter() - begin, "before": before, "peak": memory("VmHWM")}


def memory(name: str) -> float:
    """Bytes of this process by /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measured(who: str, folder: Path, out: Path) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__, "--convert", who, str(folder), str(out)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def equal(ours: Path, peer: Path) -> bool:
    """Whether two universal copies hold the same tensors, bit by bit."""
    import torch

    theirs = sorted(file for file in peer.rglob("zero/*/*.pt") if file.stem in ("fp32", "exp_avg", "exp_avg_sq"))
    for file in theirs:
        mine, other = (torch.load(path) for path in (next(ours.rglob(f"zero/{file.parent.name}/{file.name}")), file))
        if not torch.equal(mine["param"].flatten(), (other["param"] if isinstance(other, dict) else other).flatten()):
            return False
    return len(theirs) == 3 * TENSORS


def compare(scratch: Path, world: int, million: int, rounds: int) -> list[Claim]:
    folder = make_shards(scratch / f"world-{world}", world, million)
    found: dict[str, list[dict[str, float]]] = {"peer": [], "copy": [], "share": []}
    for _ in range(rounds):
        for who, rows in found.items():
            rows.append(measured(who, folder, scratch / who))
    assert equal(scratch / "copy", scratch / "peer"), "the copies differ"
    shutil.rmtree(folder)
    middle = {who: {name: median(row[name] for row in rows) for name in rows[0]} for who, rows in found.items()}
    detail: dict[str, Any] = {
        "checkpoint_gb": million * 12e6 / GIGA, "largest_tensor_gb": million * 4e6 / TENSORS / GIGA,
        "seconds": {who: [round(row["seconds"], 3) for row in rows] for who, rows in found.items()},
    }  # fmt: skip
    shards = f"{world} shard{'s' * (world > 1)}"
    copy, share, peer = middle["copy"], middle["share"], middle["peer"]
    grown = {who: row["peak"] - row["before"] for who, row in middle.items()}
    kept = million * 12e6 / RANKS
    return [
        Claim(
            f"{shards}: universal copy", copy["seconds"], peer["seconds"], peer["seconds"] / copy["seconds"], 1.0, "s",
            rounds, False, detail,
        ),
        Claim(
            f"{shards}: universal copy, memory above the imports", grown["copy"] / GIGA, grown["peer"] / GIGA,
            grown["peer"] / grown["copy"], 1.0, "GB", rounds, False, detail,
        ),
        Claim(
            f"{shards}: one of {RANKS} ranks reads its share", share["seconds"], peer["seconds"],
            peer["seconds"] / share["seconds"], 1.0, "s", rounds, False, detail,
        ),
        Claim(
            f"{shards}: one of {RANKS} ranks reads its share, memory above the imports", grown["share"] / kept, None,
            None, 1.5, "times the share", rounds, False, detail,
        ),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 4 shards, one round")
    parser.add_argument("--million", type=int, default=40, help="parameters, in millions; 12 bytes each")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        who, folder, out = options.convert
        print(json.dumps(convert(who, Path(folder), Path(out))))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        for world in (1, 4) if options.quick else SHARDS:
            rows += compare(Path(scratch), world, options.million, 1 if options.quick else 3)
    write_receipt(rows, options.out, ["torch", "deepspeed"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
