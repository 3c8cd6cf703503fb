"""Every attention backend that is here, forward and backward in bf16, at the lengths that training meets: packs of
4,096 tokens of PHOENIX-2014T and How2Sign texts, the visual encoder's windows, sentences and pooling over PHOENIX-2014T
clips, and packed connector sequences."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.attention import obstacle
from benchmarks.gpu.lengths import draw
from benchmarks.gpu.rows import Figure, Probe, run_section
from pipeline.models.attention import BACKENDS, Reach, Spans, ragged_attention
from pipeline.models.clip_layout import ClipLayout, ClipSizes

PROMPT_TOKENS = 10
SIZES = ClipSizes(window_frames=8, stride=4, max_frames=512)


@dataclass(frozen=True)
class Case:
    """One attention call of a stage."""

    name: str
    reach: Reach
    heads: int
    channels: int
    query_rows: int
    key_rows: int
    pairs: int
    """Of a query and a key that it sees."""


def packs(corpus: str, rows: int, block: int, heads: int, channels: int) -> Case:
    """Rows of documents, none cut; the padded tail of a row is a span of its own."""
    lengths: list[int] = []
    documents = iter(draw(f"{corpus}_tokens", rows * block))
    for _ in range(rows):
        left = block
        while left and (length := next(documents)) <= left:
            lengths.append(length)
            left -= length
        lengths += [left] if left else []
    return _causal(f"{corpus} packs of {block}, {heads} heads of {channels}", lengths, heads, channels)


def connector(clips: int, heads: int, channels: int) -> Case:
    """Prompt, word tokens and answer of every sample."""
    frames, texts = draw("phoenix_frames", clips), draw("phoenix_tokens", clips)
    lengths = [PROMPT_TOKENS - (-f // SIZES.stride) + text for f, text in zip(frames, texts, strict=True)]
    return _causal(f"connector sequences of {clips} clips, {heads} heads of {channels}", lengths, heads, channels)


def _causal(name: str, lengths: list[int], heads: int, channels: int) -> Case:
    spans, rows = Spans.of(lengths), sum(lengths)
    reach = Reach(spans, spans, causal=True)
    return Case(name, reach, heads, channels, rows, rows, sum(n * (n + 1) // 2 for n in lengths))


def visual(clips: int, heads: int, channels: int) -> list[Case]:
    """Windows of frames, sentences of word tokens, pooling with one query per sample."""
    frames = draw("phoenix_frames", clips)
    layout = ClipLayout.of(frames, SIZES)
    words = layout.word_lengths_B.tolist()

    def case(name: str, queries: Spans, keys: Spans, rows: tuple[int, int]) -> Case:
        pairs = int((queries.borders.diff().long() * keys.borders.diff().long()).sum())
        return Case(f"{name} of {clips} clips", Reach(queries, keys), heads, channels, *rows, pairs)

    return [
        case("windows", layout.windows, layout.windows, (sum(frames), sum(frames))),
        case("sentences", layout.samples, layout.samples, (sum(words), sum(words))),
        case("pooling", layout.queries, layout.samples, (clips, sum(words))),
    ]


def on_device(reach: Reach, device: str) -> Reach:
    """The same borders there; equal sides stay one object."""
    queries = reach.queries.to(device)
    keys = queries if reach.keys is reach.queries else reach.keys.to(device)
    return Reach(queries, keys, reach.scale, reach.causal, reach.window)


def timed(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    repeats = 1 if device == "cpu" else 20
    for warm_up in (True, False):
        start = time.perf_counter()
        for _ in range(3 if warm_up and device != "cpu" else repeats):
            call()
        if device != "cpu":
            torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / repeats


def measure(case: Case, backend: str, device: str) -> Figure:
    """Milliseconds of forward and backward together."""
    reach = on_device(case.reach, device)
    rows = (case.query_rows, case.key_rows, case.key_rows)
    q, k, v = (
        torch.randn(n, case.heads, case.channels, device=device, dtype=torch.bfloat16, requires_grad=True) for n in rows
    )
    upstream = torch.randn_like(q)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return ragged_attention(q, k, v, reach, backend)

    def both() -> object:
        return torch.autograd.grad(ragged_attention(q, k, v, reach, backend), (q, k, v), upstream)

    alone, together = timed(forward, device), timed(both, device)
    flops = 4 * case.pairs * case.heads * case.channels  # two products; backward has five
    detail = {"forward_ms": alone, "forward_tflops": flops / alone / 1e9, "tflops": 3.5 * flops / together / 1e9}
    return Figure(together, "ms", detail={**detail, "longest": reach.keys.longest, "rows": rows})


def run(probe: Probe) -> None:
    if probe.dry:
        cases = [packs("phoenix", 1, 128, 2, 16), connector(2, 2, 16), *visual(2, 2, 16)]
    else:
        cases = [
            *(packs(corpus, 4, 4096, *shape) for corpus in ("phoenix", "how2sign") for shape in ((20, 64), (16, 128))),
            connector(64, 20, 64),
            *visual(64, 8, 64),
        ]
    usable = [backend for backend in BACKENDS if not obstacle(backend, probe.device)]
    for case, backend in itertools.product(cases, usable):
        probe.figure(f"{case.name}: {backend}", lambda case=case, backend=backend: measure(case, backend, probe.device))


if __name__ == "__main__":
    run_section("attention_speed", run)
