"""Peak memory of stage 1 against the length of a pack: how much each option for long text takes off.

Every figure is one forward and backward pass of a fresh process over packs of 1,024-token documents, so that attention
grows linearly too; what counts is the peak above what the process held before, and of two ranks that share a pack the
larger one. A line is fitted over the lengths, and its slope compared with the one of the row before. What
`offload_activations` moves off a device stays in the same memory on the CPU, so it has no row here.

    python benchmarks/long_text.py [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from receipt import Claim, write_receipt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DOCUMENT_TOKENS, CHUNK_TOKENS = 1024, 1024
SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "recompute": {"recompute": True},
    "recompute and chunks": {"recompute": True, "chunks": True},
    "recompute, chunks and two ranks": {"recompute": True, "chunks": True, "ranks": 2},
}
LINEAR = 0.99


def build(recompute: bool, chunks: bool) -> Any:
    """The model of every figure, with the options."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import pipeline.models  # noqa: F401  (registers the attention keys)
    from pipeline.models.attention import implementation
    from pipeline.models.chunked_mlp import chunk_mlps
    from pipeline.models.packed_lm import PackedCausalLm

    config = AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=4, **SIZES)
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation("sdpa"))
    if recompute:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if chunks:
        chunk_mlps(llm, CHUNK_TOKENS)
    return PackedCausalLm(llm, CHUNK_TOKENS).train()


def one_pass(length: int, recompute: bool = False, chunks: bool = False, ranks: int = 1) -> int:
    """Bytes that a forward and backward pass over ``length`` positions, shared by ``ranks``, adds to this process at
    its peak."""
    import torch

    from pipeline import dist
    from pipeline.models.attention import packed_kwargs

    torch.set_num_threads(1)
    dist.init()
    group, model = dist.sequence_group(ranks), build(recompute, chunks)

    def run(positions: int) -> None:
        own = slice(group.rank * positions // ranks, (group.rank + 1) * positions // ranks)
        ids_BL = torch.randint(0, SIZES["vocab_size"], (1, positions))
        packed: dict[str, Any] = dict(packed_kwargs(torch.arange(positions)[None] // DOCUMENT_TOKENS))
        if ranks > 1:
            packed |= {"position_ids": packed["position_ids"][:, own], "sequence_group": group}
        model(ids_BL[:, own], packed, ids_BL.roll(-1, dims=1)[:, own]).backward()

    run(DOCUMENT_TOKENS)  # gradients and libraries are there from now on
    before = _peak_bytes()
    run(length)
    added = _peak_bytes() - before
    dist.barrier()
    dist.shutdown()
    return added


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(length: int, options: dict[str, Any]) -> int:
    """The same in processes of their own, whose allocator gives large blocks back at once; the largest of the ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    count = options.get("ranks", 1)
    common = {
        "MALLOC_MMAP_THRESHOLD_": "65536", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, __file__, "--one", str(length), json.dumps(options)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("\n".join(said))
    return max(int(text.splitlines()[-1]) for text in said)


def fitted(lengths: list[int], peaks: list[int]) -> tuple[float, float]:
    """Bytes per position, and how linear the growth is (squared correlation)."""
    return float(np.polyfit(lengths, peaks, 1)[0]), float(np.corrcoef(lengths, peaks)[0, 1] ** 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2k to 8k positions instead of 4k to 32k")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(str(one_pass(int(options.one[0]), **json.loads(options.one[1]))))
        return 0
    lengths = [2048, 4096, 8192] if options.quick else [4096, 8192, 16384, 32768]
    slopes: dict[str, float] = {}
    rows: list[Claim] = []
    for name, given in OPTIONS.items():
        peaks = [measure(length, given) for length in lengths]
        slopes[name], linear = fitted(lengths, peaks)
        detail: dict[str, Any] = {"lengths": lengths, "peak_bytes": peaks, "sizes": SIZES}
        rows.append(
            Claim(f"peak grows linearly: {name}", linear, None, None, LINEAR, "squared correlation", 1, True, detail)
        )
    for other, name in pairwise(OPTIONS):
        ratio = slopes[other] / slopes[name]
        rows.append(
            Claim(f"{name} against {other}", slopes[name], slopes[other], ratio, 1.5, "bytes/position", 1, False)
        )
    write_receipt(rows, options.out, ("torch", "transformers"))
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
