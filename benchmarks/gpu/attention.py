"""Every packed-attention backend that imports, forward and backward, against one float32 document at a
time. `tests/gpu` asserts on the same errors."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from benchmarks.gpu.rows import Probe, run_section
from pipeline.errors import RecipeError
from pipeline.models.attention import BACKENDS, Reach, Spans, choose, ragged_attention
from pipeline.models.clip_layout import window_lengths

LENGTHS = (1, 7, 128, 129)
FORWARD_ERROR, GRADIENT_ERROR = 1e-2, 2e-2
"""Relative errors allowed in bfloat16."""
HEADS = ((8, 8, 32), (8, 8, 64), (8, 2, 128))
"""(query heads, key and value heads, channels)."""
WINDOW_ROWS, SHIFT = 8, 4
CASES = ("causal", "causal window", "bidirectional", "windows", "pooling")
"""Packed documents of stage 1 and 3 (`causal`, one with a sliding window), and what the visual encoder asks for: whole
samples, windows of a few rows, one query per sample."""


def reach_of(case: str, device: str) -> Reach:
    """The spans of a case, on the device."""
    documents = Spans.of(LENGTHS).to(device)
    if case == "pooling":
        return Reach(Spans.of([1] * len(LENGTHS), beside=LENGTHS).to(device), documents)
    if case == "windows":
        windows = Spans.of(window_lengths(np.array(LENGTHS), WINDOW_ROWS, SHIFT)).to(device)
        return Reach(windows, windows)
    return Reach(documents, documents, causal=case != "bidirectional", window=32 if case == "causal window" else None)


def obstacle(backend: str, device: str, dtype: torch.dtype = torch.bfloat16) -> str:
    """Why a backend cannot run here, or nothing."""
    try:
        choose(backend, device, dtype)
    except RecipeError as error:
        return str(error).splitlines()[0]
    return ""


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def one_by_one(spans: Spans) -> Spans:
    """The same spans as they stand, none together with another of its length."""
    lengths = spans.borders.diff().tolist()
    return spans._replace(order_N=None, place_N=None, equal=tuple((1, length) for length in lengths))


def errors(backend: str, device: str, heads: tuple[int, int, int], case: str) -> tuple[float, float]:
    """Largest relative errors of the output and of the gradients in bfloat16; the reference computes one span at a time
    in float32."""
    n_heads, kv_heads, channels = heads
    generator = torch.Generator(device).manual_seed(0)
    reach = reach_of(case, device)
    queries, rows = int(reach.queries.borders[-1]), int(reach.keys.borders[-1])
    shapes = [(queries, n_heads, channels), (rows, kv_heads, channels), (rows, kv_heads, channels)]
    exact = [torch.randn(shape, device=device, generator=generator).bfloat16().float() for shape in shapes]
    upstream = torch.randn(shapes[0], device=device, generator=generator)
    singles = [one_by_one(spans) for spans in (reach.queries, reach.keys)]
    alone = Reach(singles[0], singles[case == "pooling"], causal=reach.causal, window=reach.window)
    results = []
    for name, seen, dtype in (("sdpa", alone, torch.float32), (backend, reach, torch.bfloat16)):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in exact]
        output = ragged_attention(*inputs, seen, name)
        results.append((output.detach(), torch.autograd.grad(output, inputs, upstream.to(dtype))))
    (expected, expected_grads), (found, found_grads) = results
    assert found.shape == expected.shape
    pairs = zip(found_grads, expected_grads, strict=True)
    return relative_error(found, expected), max(relative_error(mine, reference) for mine, reference in pairs)


def run(probe: Probe) -> None:
    for backend in BACKENDS:
        if reason := obstacle(backend, probe.device):
            probe.add(backend, True, "not here", reason=reason)
            continue
        try:
            cases = [
                (*errors(backend, probe.device, heads, case), f"{heads} {case}")
                for heads, case in itertools.product(HEADS, CASES)
            ]
        except Exception as error:  # a kernel that fails must not hide what the others do
            probe.add(backend, False, f"{type(error).__name__}: {str(error)[:120]}", text=str(error)[-2000:])
            continue
        forward, backward = max(case[0] for case in cases), max(case[1] for case in cases)
        good = forward < FORWARD_ERROR and backward < GRADIENT_ERROR
        shown = f"forward {forward:.1e}, backward {backward:.1e}"
        probe.add(backend, good, shown, limits=[FORWARD_ERROR, GRADIENT_ERROR], lengths=LENGTHS, cases=cases)
    probe.add("auto", True, choose("auto", probe.device, torch.bfloat16))


if __name__ == "__main__":
    run_section("attention", run)
