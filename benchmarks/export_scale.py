"""Export of a ZeRO-3 checkpoint against DeepSpeed's own zero_to_fp32: time and peak memory by number of shards.

    python benchmarks/export_scale.py [--quick] [--million 400] [--out FILE]

For 1, 4 and 8 ranks, real DeepSpeed engines save a ZeRO-3 checkpoint in fp32, weights and Adam (gloo, CPU). Both
converters then write it as safetensors in fp32, files of equal size at most, in a process of their own, in turns.

Seconds are those of the conversion after all imports. Ours are those of the whole `export` without the comparison with
the live model: it also checks every byte of the checkpoint, hashes what it writes and flushes it to the disk; the peer
does none of it. ``peer_flushed_seconds`` is the peer with its files flushed by fsync. Memory is the largest resident
set of the process (VmHWM), mapped pages included. The results are compared bit by bit.
"""

from __future__ import annotations

import argparse
import hashlib
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

WORLDS = (1, 4, 8)
WIDTH = 2048
GIGA = 10**9


def save(folder: Path, layers: int) -> None:
    """One rank: a model of linear layers and its ZeRO-3 checkpoint; DeepSpeed makes Adam's moments when it starts."""
    import deepspeed
    import torch

    from pipeline import dist

    dist.choose_accelerator()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}.store", rank=rank, world_size=world)
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3},
    }  # fmt: skip
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=config, dist_init_required=False
    )
    engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)


def make_checkpoint(run_dir: Path, world: int, layers: int) -> Path:
    """A complete checkpoint as a run leaves it: ZeRO shards, small files of the export, manifest."""
    from pipeline.config.load import load_recipe
    from pipeline.config.resolve import resolve
    from pipeline.engine.state import TrainState

    folder = run_dir / "checkpoints" / "step-000001"
    folder.mkdir(parents=True)
    command = [sys.executable, __file__, "--save", str(folder), "--layers", str(layers)]
    ranks = []
    for rank in range(world):
        named = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        network = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
        env = {**os.environ, **named, **network, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [rank.communicate()[0].decode() for rank in ranks]
    failed = [output[-2000:] for rank, output in zip(ranks, outputs, strict=True) if rank.returncode]
    assert not failed, f"{[rank.returncode for rank in ranks]}\n{failed[0]}"
    sets = [f"train.world_sizes=[{world}]", "train.precision=fp32", f"train.global_batch={world * 8}"]
    resolved = resolve(load_recipe("demo_continued_pretraining", sets), world)
    plan = {"prefix": "", "tied": [], "frozen": [], "sources": {}}
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "hf" / "export.json").write_text(json.dumps(plan))
    (folder / "state.json").write_text(json.dumps(TrainState(step=1, data={"fingerprint": ""}).to_dict()))
    (folder / "recipe.resolved.yaml").write_text(resolved.to_yaml())
    files = [path for path in folder.rglob("*") if path.is_file()]
    parts = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files}
    manifest = json.dumps({"format_version": 1, "step": 1, "world_size": world, "parts": parts})
    (folder / "manifest.json").write_text(manifest)
    (folder / "COMPLETE").write_text(hashlib.sha256(manifest.encode()).hexdigest())
    return folder


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def convert(who: str, folder: Path, out: Path, max_bytes: int) -> dict[str, float]:
    """One conversion in this process: seconds after imports, and memory before and at most."""
    if who == "ours":
        from pipeline.export.hf import export

        before, begin = memory("VmRSS"), time.perf_counter()
        export(folder, out, check=False, max_shard_bytes=max_bytes)
    else:
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        before, begin = memory("VmRSS"), time.perf_counter()
        convert_zero_checkpoint_to_fp32_state_dict(
            str(folder), str(out), max_shard_size=max_bytes, safe_serialization=True, tag="deepspeed"
        )
    seconds = time.perf_counter() - begin
    for path in out.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    flushed = time.perf_counter() - begin
    return {"seconds": seconds, "flushed": flushed, "before": before, "peak": memory("VmHWM")}


def memory(name: str) -> float:
    """Bytes of this process by /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measured(who: str, folder: Path, out: Path, max_bytes: int) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--convert", who, str(folder), str(out), str(max_bytes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def equal(first: Path, second: Path) -> bool:
    """Whether two exports hold the same tensors, bit by bit."""
    import torch
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, Path]:
        found = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    ours, peers = tensors(first), tensors(second)
    for name in ours:
        with safe_open(ours[name], "pt") as mine, safe_open(peers[name], "pt") as other:
            if not torch.equal(mine.get_tensor(name), other.get_tensor(name)):
                return False
    return ours.keys() == peers.keys()


def compare(scratch: Path, world: int, layers: int, rounds: int, max_bytes: int) -> list[Claim]:
    run_dir = scratch / f"world-{world}"
    folder = make_checkpoint(run_dir, world, layers)
    found: dict[str, list[dict[str, float]]] = {"peer": [], "ours": []}
    for _ in range(rounds):
        for who, rows in found.items():
            rows.append(measured(who, folder, scratch / who, max_bytes))
    assert equal(scratch / "ours", scratch / "peer"), "the exports differ"
    shutil.rmtree(run_dir)
    middle = {who: {name: median(row[name] for row in rows) for name in rows[0]} for who, rows in found.items()}
    ours, peer = middle["ours"], middle["peer"]
    state = layers * (WIDTH + 1) * WIDTH * 4
    grown = {who: row["peak"] - row["before"] for who, row in middle.items()}
    detail: dict[str, Any] = {
        "parameters_gb": state / GIGA, "largest_tensor_gb": WIDTH**2 * 4 / GIGA, "largest_file_gb": max_bytes / GIGA,
        "peer_flushed_seconds": peer["flushed"], "imports_gb": [row["before"] / GIGA for row in (ours, peer)],
        "seconds": {who: [round(row["seconds"], 3) for row in rows] for who, rows in found.items()},
    }  # fmt: skip
    shards = f"{world} ZeRO-3 shard{'s' * (world > 1)}"
    target = 4.0 if world >= 4 else 1.0
    return [
        Claim(
            f"{shards}: seconds", ours["seconds"], peer["seconds"], peer["seconds"] / ours["seconds"], 1.0, "s",
            rounds, False, detail,
        ),
        Claim(
            f"{shards}: peak memory", ours["peak"] / GIGA, peer["peak"] / GIGA, peer["peak"] / ours["peak"], target,
            "GB", rounds, False, detail,
        ),
        Claim(
            f"{shards}: peak memory above the imports", grown["ours"] / GIGA, grown["peer"] / GIGA,
            grown["peer"] / grown["ours"], target, "GB", rounds, False, detail,
        ),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without 8 shards, one round")
    parser.add_argument("--million", type=int, default=400, help="parameters, in millions")
    parser.add_argument("--max-shard-gib", type=float, default=4.0, help="largest file of both exports")
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS, help="numbers of shards")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--convert", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.save:
        save(options.save, options.layers)
        return 0
    if options.convert:
        who, folder, out, max_bytes = options.convert
        found = convert(who, Path(folder), Path(out), int(max_bytes))
        print("\n" + json.dumps(found))
        return 0
    layers = max(2, options.million * 10**6 // WIDTH**2)
    rows = []
    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        for world in options.worlds[:-1] if options.quick else options.worlds:
            rows += compare(Path(scratch), world, layers, 1 if options.quick else 3, int(options.max_shard_gib * 2**30))
    write_receipt(rows, options.out, ("torch", "deepspeed", "safetensors"))
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
