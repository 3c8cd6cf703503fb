"""What this machine is: versions, compiler, device, free memory; how fast it multiplies (bf16, FP8) and copies."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.rows import Figure, Probe, run_section
from benchmarks.receipt import hardware

PACKAGES = (
    "torch", "triton", "transformers", "deepspeed", "peft", "accelerate", "pydantic", "webdataset", "av", "pyarrow",
    "sentencepiece", "safetensors", "liger-kernel", "flash-attn", "flash-attn-4", "nvidia-nccl-cu13",
)  # fmt: skip
NEEDED = ("torch", "transformers", "deepspeed", "peft", "pydantic", "webdataset", "av", "pyarrow", "sentencepiece")


def package_versions() -> dict[str, str]:
    """Of this Python and every package that the figures depend on; `absent` where there is none."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def run(probe: Probe) -> None:
    import torch

    found = package_versions()
    missing = [name for name in NEEDED if found[name] == "absent"]
    probe.add("packages", not missing, f"missing {', '.join(missing)}" if missing else "complete", **found)
    compiler, nvcc = shutil.which("gcc") or shutil.which("clang"), shutil.which("nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    release = said.strip().splitlines()[-1] if said else "absent"
    probe.add("C compiler for Triton", probe.dry or compiler is not None, compiler or "absent", nvcc=release)
    if probe.dry:
        probe.add("device", True, "cpu", **hardware())
        probe.add("matrix product", True, *_matmul("cpu", torch.float32, 256))
        probe.figure("matrix product FP8", lambda: fp8_product(probe, 256))
        return
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    about = {"cuda": torch.version.cuda, "capability": list(torch.cuda.get_device_capability(0)), **hardware()}
    about["multiprocessors"] = properties.multi_processor_count
    about["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    probe.add("device", True, properties.name, **about)
    probe.add("free memory", free > 0.8 * total, free / 2**30, "GiB", total_gib=total / 2**30)
    probe.add("matrix product bf16 8192", True, *_matmul("cuda", torch.bfloat16, 8192))
    probe.figure("matrix product FP8", lambda: fp8_product(probe, 8192))
    probe.add("device copy", True, *_copy())


def _matmul(device: str, dtype: Any, size: int) -> tuple[float, str]:
    """TFLOP/s of a square product of random numbers."""
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device) / 1e12, "TFLOP/s"


def fp8_product(probe: Probe, size: int) -> Figure:
    """TFLOP/s of a product in FP8 with one scale per tensor (`torch._scaled_mm`), and its relative error."""
    import torch

    from benchmarks.gpu.fp8 import quantised, scaled_product

    a, b = (torch.randn(size, size, device=probe.device, dtype=torch.bfloat16) for _ in range(2))
    a_parts, b_parts = quantised(a, torch.float8_e4m3fn), quantised(b, torch.float8_e4m3fn)
    found = scaled_product(a_parts, b_parts).float()
    error = float((found - a.float() @ b.float().T).norm() / found.norm())
    rate = 2 * size**3 / _seconds(lambda: scaled_product(a_parts, b_parts), probe.device) / 1e12
    return Figure(rate, "TFLOP/s", ok=error < 0.1, detail={"relative_error": error})


def _copy() -> tuple[float, str]:
    """Bytes read and written per second by a copy far larger than the cache."""
    import torch

    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _seconds(lambda: target.copy_(source), "cuda") / 1e12, "TB/s"


def _seconds(work: Callable[[], Any], device: str) -> float:
    """Seconds of one call, the mean of ten after three."""
    import torch

    for _ in range(3):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        work()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / 10


if __name__ == "__main__":
    run_section("environment", run)
