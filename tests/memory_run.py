"""One run of a stage in this process, and its peak of memory beside the planner's: a line of JSON.

    python -m tests.memory_run STAGE ZERO_STAGE DEVICE FOLDER PORT

On CUDA the peak is the allocator's, on the CPU that of the tensors the run makes (`pipeline.memory.trace`).
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

SIZES = {
    "cpu": {"width": 256, "layers": 4, "vit": 192, "pixels": 64, "block": 512, "micro": 4},
    "cuda": {"width": 1024, "layers": 12, "vit": 384, "pixels": 112, "block": 2048, "micro": 8},
}


def settings(stage: str, zero: int, device: str, folder: Path) -> list[str]:
    """Models large enough for their bytes to outweigh counters and workspaces; steps of one micro-batch and of two."""
    from benchmarks.gpu.rows import Probe, world
    from benchmarks.gpu.settings import run_sets

    probe, size = Probe("memory", folder / "rows.jsonl", folder, dry=device == "cpu"), SIZES[device]
    data = world(probe)
    llm = {
        "width": size["width"], "layers": size["layers"], "heads": 4, "feed_forward": 3 * size["width"],
        "max_positions": 4096,
    }  # fmt: skip
    vit = {"width": size["vit"], "layers": 4, "heads": 4, "feed_forward": 4 * size["vit"], "patch_pixels": 16}
    visual = {
        "backbone": {"tiny": vit, "train": "full", "pool": "mean"}, "width": 128, "max_frames": 128,
        "word": {"heads": 2}, "sentence": {"heads": 2},
    }  # fmt: skip
    models = {"llm": {"tiny": llm, "tokenizer": str(data / "tokenizer")}, "visual": visual}
    if stage == "contrastive":
        models["text_encoder"] = {"path": str(text_encoder(folder, data / "tokenizer"))}
    parts = {
        "continued_pretraining": ["llm"],
        "contrastive": ["visual", "text_encoder"],
        "connector": ["llm", "visual"],
    }
    shards = data / "shards" / ("text" if stage == "continued_pretraining" else "video")
    return [
        *run_sets(probe, folder / f"{stage}-zero{zero}", zero, 3), f"data.train=[{{shards: {shards}}}]",
        "data.workers=0", f"train.global_batch={size['micro']}", f"train.micro_batch={size['micro']}",
        f"data.block_tokens={size['block']}", f"data.image_pixels={size['pixels']}",
        "data.max_frames=12", "connector.max_new_tokens=12",
        *(f"model.{part}={json.dumps(models[part])}" for part in parts[stage]),
    ]  # fmt: skip


def text_encoder(folder: Path, tokenizer: Path) -> Path:
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model("bert", vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)), **sizes)
    AutoModel.from_config(config).save_pretrained(folder / "text")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "text")
    return folder / "text"


def main(stage: str, zero: int, device: str, folder: Path) -> dict[str, Any]:
    import torch

    from benchmarks.loops import fit, make_training
    from pipeline.memory.plan import plan_memory
    from pipeline.memory.trace import Count

    chosen = settings(stage, zero, device, folder)
    count = Count([], device) if device == "cpu" else None
    with count or nullcontext():
        training = make_training(f"demo_{stage}", chosen, device)
        if count is None:
            torch.cuda.reset_peak_memory_stats()
        else:
            count.most = count.live
        fit(training, [], [])
    measured = torch.cuda.max_memory_allocated() if count is None else count.most
    plan = plan_memory(training.resolved)
    lines = {line.item: line.bytes for line in plan.lines if plan.phase in line.phases}
    return {"measured": measured, "planned": plan.peak_bytes, "phase": plan.phase, "lines": lines}


if __name__ == "__main__":
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[5])
    found = main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    sys.stdout.write(json.dumps(found) + "\n")
