"""From the command to the first finished step: `slt launch run` against bare DeepSpeed on the same tiny model.

Two ranks on this machine. The peers run a script without data, checks, locks, logs or checkpoints
(`benchmarks/launch_rank.py:bare`): once as users start it (`deepspeed`), once by `deepspeed.launcher.launch` alone,
which is what starts our ranks, too. All in turn, several rounds; the ratios are medians over the rounds. Every side
stamps the same moments of its start, so the receipt says where the time goes.

    python benchmarks/launch_time.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from receipt import ROOT, Claim, write_receipt

WORLD_SIZE, BLOCK, GLOBAL_BATCH, MICRO_BATCH = 2, 96, 8, 2
SIDES = ("ours", "deepspeed", "deepspeed.launcher.launch")
PARTS = ("launcher", "imports", "rendezvous", "model", "first step")
TARGET = 1 / 1.2
RANK = ROOT / "benchmarks" / "launch_rank.py"
TINY = {"width": 32, "layers": 2, "heads": 2, "feed_forward": 64, "max_positions": 256}
OURS = (
    "import sys; from pathlib import Path; from launch import options; from launch.start import main; "
    f"options.TRAIN_SCRIPT = Path({str(RANK)!r}); main()"
)


def command(side: str, world: Path, run_dir: Path) -> list[str]:
    """What a user types, with the stamped script as the program of the ranks."""
    tokenizer = world / "tokenizer"
    if side == "ours":
        tiny = ", ".join(f"{name}: {size}" for name, size in TINY.items())
        sets = [
            f"run_dir={run_dir}", f"model.llm={{tiny: {{{tiny}}}, tokenizer: {tokenizer}}}", "data.eval=[]",
            f"data.train=[{{shards: {world / 'shards' / 'text'}}}]", f"data.block_tokens={BLOCK}", "data.workers=0",
            f"train.global_batch={GLOBAL_BATCH}", f"train.micro_batch={MICRO_BATCH}", "train.steps=2",
            "train.world_sizes=[2]", "train.optimizer.warmup_steps=1", "train.eval_every_steps=0",
            "train.tensorboard=false",
        ]  # fmt: skip
        run = ["launch", "run", "demo_continued_pretraining", "--num-procs", str(WORLD_SIZE)]
        return [sys.executable, "-c", OURS, *run, *(part for text in sets for part in ("--set", text))]
    names = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    names |= {"feed_forward": "intermediate_size", "max_positions": "max_position_embeddings"}
    sizes = json.dumps({names[name]: size for name, size in TINY.items()})
    accumulation = GLOBAL_BATCH // (MICRO_BATCH * WORLD_SIZE)
    script = [str(RANK), "bare", str(tokenizer), sizes, *map(str, (BLOCK, MICRO_BATCH, accumulation))]
    if side == "deepspeed":
        deepspeed = str(Path(sys.executable).parent / "deepspeed")
        meet = ["--master_addr", "127.0.0.1", "--master_port", _free_port()]
        return [deepspeed, "--num_gpus", str(WORLD_SIZE), *meet, "--no_local_rank", *script]
    ranks = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(WORLD_SIZE))}).encode()).decode()
    launcher = ["-m", side, f"--world_info={ranks}", f"--master_port={_free_port()}", "--no_local_rank"]
    return [sys.executable, "-u", *launcher, *script]


def seconds(side: str, world: Path, folder: Path) -> dict[str, float]:
    """Seconds of every part of one start."""
    folder.mkdir(parents=True)
    stamps, log = folder / "stamps.json", folder / "log"
    env = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "SLT_BENCH_STAMPS": str(stamps), "PYTHONPATH": str(ROOT),
        # `deepspeed` compiles an extension at its first start: in the warm-up round
        "TORCH_EXTENSIONS_DIR": str(world / "torch_extensions"),
    }  # fmt: skip
    argv = command(side, world, folder / "run")
    begin = time.time()
    with log.open("wb") as sink:
        done = subprocess.run(argv, env=env, cwd=ROOT, stdout=sink, stderr=sink, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: exit code {done.returncode}\n{log.read_text()[-4000:]}")
    times = [begin, *json.loads(stamps.read_text()).values()]
    return dict(zip(PARTS, (after - before for before, after in pairwise(times)), strict=True))


def measure(world: Path, runs: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Parts of every start of every side; who begins changes from round to round, and the first round is warm-up."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        first = number % len(SIDES)
        for side in (*SIDES[first:], *SIDES[:first]):
            parts = seconds(side, world, runs / f"{side}-{number}")
            if number:
                found[side].append(parts)
    return found


def claims(found: dict[str, list[dict[str, float]]]) -> list[Claim]:
    totals = {side: [sum(parts.values()) for parts in rounds] for side, rounds in found.items()}
    split = {
        side: {part: round(statistics.median(parts[part] for parts in rounds), 2) for part in PARTS}
        for side, rounds in found.items()
    }
    rows = []
    for peer in SIDES[1:]:
        ratios = [theirs / mine for mine, theirs in zip(totals["ours"], totals[peer], strict=True)]
        rows.append(
            Claim(
                claim=f"command to first step, two ranks, against a bare script started by {peer}",
                ours=statistics.median(totals["ours"]),
                peer=statistics.median(totals[peer]),
                ratio=statistics.median(ratios),
                target=TARGET,
                unit="s",
                runs=len(ratios),
                higher_is_better=False,
                detail={"split": {"ours": split["ours"], peer: split[peer]}, "ratios": ratios, "seconds": totals},
            )
        )
    return rows


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of seven")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from pipeline.demo.data import prepare
    from pipeline.demo.settings import SMOKE

    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        world = Path(scratch) / "world"
        prepare(world, SMOKE, seed=0, workers=1)
        rows = claims(measure(world, Path(scratch) / "runs", 2 if options.quick else 7))
    for row in rows:
        print(json.dumps(row.detail["split"]))
    write_receipt(rows, options.out, ("torch", "deepspeed", "transformers"))
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
