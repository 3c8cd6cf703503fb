"""Stage-1 step time: our trainer against a bare DeepSpeed loop on the same model, packs and ZeRO-3 configuration.

The bare loop has its packs in memory, no loader, no metrics and no checkpoints: what it takes is the engine's own
time, so the ratio is what our pipeline adds. Both run as two real processes, in turn, several times.

    python benchmarks/stage1_step.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from receipt import Claim, write_receipt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORLD_SIZE = 2
MODEL = "{width: 256, layers: 4, heads: 4, feed_forward: 768, max_positions: 1024}"


def sets(world: Path, run_dir: Path, steps: int) -> list[str]:
    """The recipe both sides use."""
    return [
        f"run_dir={run_dir}", f"model.llm={{tiny: {MODEL}, tokenizer: {world / 'tokenizer'}}}",
        f"data.train=[{{shards: {world / 'shards' / 'text'}}}]", "data.eval=[]", "data.block_tokens=512",
        "train.global_batch=16", "train.micro_batch=4", "train.world_sizes=[2]", f"train.steps={steps}",
        "train.log_every_steps=5", "train.eval_every_steps=0", "train.checkpoint.every_steps=0",
    ]  # fmt: skip


def bare(world: Path, run_dir: Path, steps: int) -> None:
    """One rank of the bare loop; rank 0 writes the seconds of every block of five steps."""
    import deepspeed
    import torch

    from pipeline import dist
    from pipeline.config.load import load_recipe
    from pipeline.config.resolve import resolve
    from pipeline.engine.setup import parameter_groups, quiet_deepspeed
    from pipeline.stages.batches import to_device
    from pipeline.stages.continued_pretraining import ContinuedPretraining
    from pipeline.stages.data import StageContext
    from shards.load.loader import StepLoader
    from shards.load.requests import LoaderOptions

    ranks = dist.init()
    recipe = load_recipe("demo_continued_pretraining", sets(world, run_dir, steps))
    resolved = resolve(recipe, ranks.world_size)
    torch.manual_seed(0)
    from transformers.integrations import HfDeepSpeedConfig

    keep_alive = HfDeepSpeedConfig(resolved.ds_config)
    plans = ContinuedPretraining.plans(recipe)
    context = StageContext(recipe, ranks.rank, ranks.world_size, torch.device("cpu"), zero_stage=3)
    stage = ContinuedPretraining.build(context, plans)
    model = stage.module.llm
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3)
    with quiet_deepspeed():
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=resolved.ds_config)[0]
    options = LoaderOptions(ranks.rank, ranks.world_size, 16, 4)
    loader = StepLoader(plans.train, stage.fetch(), stage.collate(), options)
    batches = [batch for _, batch in zip(range(steps), loader, strict=False)]
    seconds, start = [], time.perf_counter()
    for number, step_batch in enumerate(batches, 1):
        for micro in step_batch.micro_batches:
            micro = to_device(micro, stage.device)
            targets = {"labels": micro["targets_BL"], "shift_labels": micro["targets_BL"]}
            engine.backward(engine(input_ids=micro["input_ids_BL"], **targets, **micro["packed"]).loss)
            engine.step()
        if number % 5 == 0:
            dist.barrier()
            seconds.append((time.perf_counter() - start) / 5)
            start = time.perf_counter()
    if ranks.is_main:
        (run_dir / "bare.json").write_text(json.dumps(seconds))
    del keep_alive


def launch(command: list[str]) -> None:
    """Two ranks of a command; raises when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks, said = [], []
    for rank in range(WORLD_SIZE):
        env = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        # no pipe: one that nobody empties stops its rank, and so all
        said.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        ranks.append(subprocess.Popen(command, env=env, stdout=said[-1], stderr=subprocess.STDOUT))
    failed = [rank.wait() for rank in ranks]
    for file in said:
        file.seek(0)
    if any(failed):
        raise SystemExit("\n".join(file.read() for file in said))
    for file in said:
        file.close()


def ours_seconds(world: Path, folder: Path, steps: int) -> list[float]:
    """Seconds per step of every logged block of our trainer, its loader, metrics and agreement included."""
    from pipeline.engine.metrics import read_metrics

    command = [sys.executable, str(ROOT / "launch" / "train.py"), "demo_continued_pretraining"]
    for value in sets(world, folder, steps):
        command += ["--set", value]
    launch(command)
    rows = [row for row in read_metrics(folder) if "perf/samples_per_second" in row]
    return [row["perf/seconds_per_step"] for row in rows]


def bare_seconds(world: Path, folder: Path, steps: int) -> list[float]:
    folder.mkdir(parents=True)
    launch([sys.executable, __file__, "--bare", str(world), str(folder), str(steps)])
    return json.loads((folder / "bare.json").read_text())


def measure(steps: int, rounds: int) -> tuple[list[float], list[float]]:
    """Median seconds per step of each round, ours and bare in turn; the first block of a run is warm-up."""
    from pipeline.demo.data import prepare
    from pipeline.demo.settings import DemoSize

    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name:
        world = Path(name) / "world"
        prepare(world, DemoSize(4, 4, 4, 4, text_train=8000, text_dev=100), seed=0, workers=2)
        for number in range(rounds):
            ours.append(statistics.median(ours_seconds(world, Path(name) / f"ours-{number}", steps)[1:]))
            theirs.append(statistics.median(bare_seconds(world, Path(name) / f"bare-{number}", steps)[1:]))
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare(Path(options.bare[0]), Path(options.bare[1]), int(options.bare[2]))
        return
    rounds, steps = (2, 20) if options.quick else (5, 40)
    ours, theirs = measure(steps, rounds)
    row = Claim(
        claim="stage-1 step time against a bare DeepSpeed ZeRO-3 loop",
        ours=statistics.median(ours),
        peer=statistics.median(theirs),
        ratio=statistics.median(bare / mine for mine, bare in zip(ours, theirs, strict=True)),
        target=1 / 1.05,
        unit="s/step",
        runs=rounds,
        higher_is_better=False,
        detail={"ours": ours, "bare": theirs, "world_size": WORLD_SIZE, "model": MODEL, "block_tokens": 512},
    )
    write_receipt([row], options.out, ("torch", "deepspeed", "transformers"))
    sys.exit(0 if row.reached else 1)


if __name__ == "__main__":
    main()
