"""A training step of every stage: our trainer against a bare DeepSpeed loop and against Hugging Face's Trainer with
DeepSpeed, on the same model, data, packs and configuration (`benchmarks/loops.py` says what each does).

Stage 1 trains a small LLM under ZeRO-3; the video stages train on stored frame features under ZeRO-2, because decoding
costs all sides alike. Two real processes per run; all sides in turn, several times, and the ratios are medians over the
rounds, because two cores are a noisy clock.

    python benchmarks/stage_step.py [--quick] [--stages 1,2,3] [--out FILE]
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from receipt import Claim, write_receipt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORLD_SIZE = 2
SIDES = ("ours", "bare", "hugging_face")
RECIPES = {"1": "demo_continued_pretraining", "2": "demo_contrastive", "3": "demo_connector"}
BARE_TARGET, TRAINER_TARGET = 1 / 1.03, 1.1
MODEL = "{width: 256, layers: 4, heads: 4, feed_forward: 768, max_positions: 1024}"
LLM = {"width": 192, "layers": 4, "heads": 4, "feed_forward": 512, "max_positions": 512}
BACKBONE = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 56}
VISUAL = "width: 192, max_frames: 128, word: {layers: 2, window_frames: 8, stride: 4, heads: 4}"


def sets(stage: str, world: Path, run_dir: Path, steps: int) -> list[str]:
    """The recipe that all sides use."""
    common = [
        f"run_dir={run_dir}", "data.eval=[]", "train.world_sizes=[2]", f"train.steps={steps}",
        "train.log_every_steps=10", "train.eval_every_steps=0", "train.checkpoint.every_steps=0",
    ]  # fmt: skip
    if stage == "1":
        return [
            *common, f"model.llm={{tiny: {MODEL}, tokenizer: {world / 'tokenizer'}}}",
            f"data.train=[{{shards: {world / 'shards' / 'text'}}}]", "data.block_tokens=512",
            "train.global_batch=16", "train.micro_batch=4",
        ]  # fmt: skip
    parts, features = world / "parts", f"data.train=[{{shards: {world / 'parts' / 'features'}}}]"
    if stage == "2":
        visual = stage_parts(world).visual_set("frozen")
        models = [visual, f"model.text_encoder.path={parts / 'llm'}", "train.micro_batch=32", "data.unique_texts=false"]
        return [*common, *models, features, "data.image_pixels=56", "train.global_batch=64"]
    models = [f"model.llm.path={parts / 'llm'}", f"model.visual.path={parts / 'encoder'}"]
    return [*common, *models, features, "data.image_pixels=56", "train.global_batch=64", "train.micro_batch=16"]


def stage_parts(world: Path) -> Any:
    from benchmarks.stage_parts import Parts

    return Parts(world / "parts", world / "tokenizer", LLM, BACKBONE, VISUAL)


def prepare_world(world: Path) -> None:
    """Texts, clips, random models and features."""
    import torch

    from benchmarks.stage_parts import extract_features, make_parts
    from pipeline.demo.data import prepare
    from pipeline.demo.settings import DemoSize

    prepare(world, DemoSize(128, 4, 4, 4, text_train=8000, text_dev=100), seed=0, workers=2)
    parts = stage_parts(world)
    make_parts(parts, 56, torch.float32)
    extract_features(parts, world / "shards" / "video", ["data.image_pixels=56", "train.precision=fp32"], 2)


def one_rank(side: str, stage: str, world: Path, run_dir: Path, steps: int) -> None:
    """What every process of a run does; rank 0 writes the timing."""
    from benchmarks import hf_trainer, loops

    run = loops.Run(RECIPES[stage], sets(stage, world, run_dir, steps), "cpu")
    loop = {"ours": loops.ours, "bare": loops.bare, "hugging_face": hf_trainer.hugging_face}[side]
    timing = loop(run)
    if os.environ["RANK"] == "0":
        (run_dir / "timing.json").write_text(json.dumps(asdict(timing)), encoding="utf-8")


def seconds(side: str, stage: str, world: Path, run_dir: Path, steps: int) -> float:
    """Median seconds per step of one run; its first block is warm-up."""
    run_dir.mkdir(parents=True)
    launch([sys.executable, __file__, "--rank-of", side, stage, str(world), str(run_dir), str(steps)])
    return statistics.median(json.loads((run_dir / "timing.json").read_text(encoding="utf-8"))["seconds"][1:])


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
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        # no pipe: one that nobody empties stops its rank, and so all
        said.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        ranks.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=said[-1], stderr=subprocess.STDOUT))
    failed = [rank.wait() for rank in ranks]
    for file in said:
        file.seek(0)
    if any(failed):
        raise SystemExit("\n".join(file.read() for file in said))
    for file in said:
        file.close()


def measure(stage: str, world: Path, runs: Path, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of every side, one figure per round; who begins changes from round to round."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds):
        first = number % len(SIDES)
        for side in (*SIDES[first:], *SIDES[:first]):
            found[side].append(seconds(side, stage, world, runs / f"{stage}-{side}-{number}", steps))
    return found


def claims(stage: str, found: dict[str, list[float]]) -> list[Claim]:
    """Ours against each peer."""
    rows = []
    for side, peer, target in (
        ("bare", "a bare DeepSpeed loop", BARE_TARGET),
        ("hugging_face", "Hugging Face Trainer with DeepSpeed", TRAINER_TARGET),
    ):
        ratios = [theirs / mine for mine, theirs in zip(found["ours"], found[side], strict=True)]
        rows.append(
            Claim(
                claim=f"stage-{stage} step time against {peer}",
                ours=statistics.median(found["ours"]),
                peer=statistics.median(found[side]),
                ratio=statistics.median(ratios),
                target=target,
                unit="s/step",
                runs=len(ratios),
                higher_is_better=False,
                detail={"ours": found["ours"], side: found[side], "ratios": ratios, "world_size": WORLD_SIZE},
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stages", default="1,2,3", help="numbers, separated by commas")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--rank-of", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        side, stage, world, run_dir, steps = options.rank_of
        one_rank(side, stage, Path(world), Path(run_dir), int(steps))
        return
    rounds, steps = (2, 15) if options.quick else (7, 30)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        world = Path(name) / "world"
        prepare_world(world)
        for stage in options.stages.split(","):
            rows += claims(stage, measure(stage, world, Path(name), steps, options.rounds or rounds))
    write_receipt(rows, options.out, ("torch", "deepspeed", "transformers", "accelerate"))
    sys.exit(0 if all(row.reached for row in rows) else 1)


if __name__ == "__main__":
    main()
