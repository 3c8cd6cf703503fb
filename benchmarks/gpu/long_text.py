"""Stage 1 on packs of 32,768 tokens, bf16: tokens per second, planned and allocated memory, one option for long text
after the other. Sequence parallelism needs several GPUs."""

from __future__ import annotations

import functools

from benchmarks.gpu import memory
from benchmarks.gpu.llm import Size, figures, run_of
from benchmarks.gpu.rows import Probe, run_section
from benchmarks.loops import ours

LONG = Size(
    "0.5B", "{width: 1280, layers: 24, heads: 20, feed_forward: 3456, max_positions: 32768}", 0, 0.0, 32768, 2, 1, 8
)
TOY = Size("toy", "{width: 32, layers: 2, heads: 2, feed_forward: 64, max_positions: 256}", 0, 0.0, 256, 2, 1, 4, 200)
ZERO = 1


def options(size: Size) -> list[tuple[str, str]]:
    """Each one is added to those before it."""
    return [
        ("recomputation", "model.gradient_checkpointing=true"),
        ("and chunked MLPs", f"continued_pretraining.mlp_chunk_tokens={size.block_tokens // 8}"),
        ("and inputs in host memory", "continued_pretraining.offload_activations=true"),
    ]


def run(probe: Probe) -> None:
    size, sets = TOY if probe.dry else LONG, []
    for number, (name, added) in enumerate(options(size)):
        sets.append(added)
        run = run_of(probe, size, f"long-{number}", ZERO, tuple(sets))
        row = figures(probe, size, f"packs of {size.block_tokens}, {name}", functools.partial(ours, run))
        if row is not None:
            memory.compare(probe, f"{size.name} {name}", run, row["detail"]["peak_gib"])


if __name__ == "__main__":
    run_section("long_text", run)
