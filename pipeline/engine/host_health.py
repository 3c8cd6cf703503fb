"""How fast and how exactly a host computes, and how fast it reaches the others: a short run before training.

``python -m pipeline.engine.host_health QUESTION`` on every host prints one line, which `launch.health` judges.

The matrices hold small integers, so that every partial sum is exact in float32: a sound device gives the same product
bit by bit, whatever its make and its order of summation. Hosts exchange in pairs, in several rounds with other
partners: a slow link slows every exchange of its host, but at most one of any other host's. They number themselves as
they arrive, so no launcher has to tell them who they are.
"""

from __future__ import annotations

import datetime
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch.distributed import TCPStore as Store  # type: ignore[attr-defined]

from pipeline import dist

MARK = "slt-host-health"
"""First word of the line."""
ROUNDS = 3
_LARGEST = 4
_REPEATS = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    side: int
    """Of the square matrices."""
    seconds: float
    """Of products, per device."""
    exchanged_bytes: int


SIZES = {
    ("quick", "cuda"): Sizes(4096, 0.3, 32 << 20),
    ("full", "cuda"): Sizes(8192, 5.0, 256 << 20),
    ("quick", "cpu"): Sizes(512, 0.1, 4 << 20),
    ("full", "cpu"): Sizes(1024, 2.0, 64 << 20),
}


def measure(question: dict[str, Any]) -> dict[str, Any]:
    """Measure this host.

    Args:
        question: ``level`` (quick or full), ``hosts``, ``address`` and ``port`` where they meet, ``devices`` to use
            (numbers, the first of which exchanges; on the CPU they do not matter), ``seconds`` to wait for the others.

    Returns:
        ``devices``: number -> ``tflops``, ``sums`` of the product, ``sound`` (finite and repeatable) or ``problem``;
        with several hosts ``gib_per_second`` of the best exchange and ``all_reduce_gib_per_second``.
    """
    cuda = dist.uses_cuda()
    sizes = SIZES[question["level"], "cuda" if cuda else "cpu"]
    count = torch.cuda.device_count() if cuda else 1
    numbers = [number for number in question["devices"] if number < count] if cuda else [0]
    answer: dict[str, Any] = {"devices": {str(number): _device(number, cuda, sizes) for number in numbers}}
    if question["hosts"] > 1:
        answer |= _together(question, torch.device("cuda", numbers[0]) if cuda else torch.device("cpu"), sizes)
    return answer


# -- one device ------------------------------------------------------------------------------------------------------
def _device(number: int, cuda: bool, sizes: Sizes) -> dict[str, Any]:
    device = torch.device("cuda", number) if cuda else torch.device("cpu")
    try:
        return products(device, sizes)
    except RuntimeError as error:  # no memory left, a device that fell off the bus
        return {"problem": str(error).splitlines()[0]}


def products(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Multiply the same matrices again and again; the rate is that of the best quarter of the time."""
    left, right = _matrices(sizes.side, device)
    first = left @ right
    _wait(device)
    rates, last = [], first
    for _ in range(_REPEATS):
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < sizes.seconds / _REPEATS:
            for _ in range(4):
                last = left @ right
            _wait(device)
            count += 4
        rates.append(2 * sizes.side**3 * count / (time.perf_counter() - start) / 1e12)
    sound = bool(torch.isfinite(last).all()) and torch.equal(first, last)
    return {"tflops": round(max(rates), 6), "sums": _sums(last), "sound": sound}


def _matrices(side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cuda":  # partial sums in 16 bits would depend on their order
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    shape = (side, side)
    made = [torch.randint(-_LARGEST, _LARGEST + 1, shape, dtype=torch.int8, generator=generator) for _ in range(2)]
    left, right = (matrix.to(device).to(dtype) for matrix in made)
    return left, right


def _sums(product: torch.Tensor) -> list[float]:
    """The sum of all elements and one in which their places count: exact, so equal for equal products."""
    whole = product.double()
    places = torch.arange(whole.numel(), device=whole.device).remainder_(97).reshape(whole.shape)
    return [float(whole.sum()), float((whole * places).sum())]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- between hosts ---------------------------------------------------------------------------------------------------
def _together(question: dict[str, Any], device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Join the other hosts, exchange with some of them, add up over all."""
    hosts, limit = question["hosts"], datetime.timedelta(seconds=question["seconds"])
    store, serves = _meet(question["address"], question["port"], limit)
    rank = store.add("arrived", 1) - 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch_dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=hosts, timeout=limit
    )
    rates = [_exchange(partner, device, sizes.exchanged_bytes) for partner in partners(rank, hosts)]
    answer = {"gib_per_second": round(max(rates), 4), **_all_reduce(rank, hosts, device, sizes.exchanged_bytes)}
    torch_dist.destroy_process_group()
    store.add("left", 1)
    while serves and store.add("left", 0) < hosts:  # the others still need it
        time.sleep(0.01)
    return answer


def _meet(address: str, port: int, limit: datetime.timedelta) -> tuple[Any, bool]:
    """The hosts' common store, and whether it is in this process: on the host of the address, the first to come."""
    if is_here(address):
        try:
            return Store(address, port, None, True, limit, wait_for_workers=False), True
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise
    return Store(address, port, None, False, limit, wait_for_workers=False), False


def is_here(address: str) -> bool:
    """Whether an address is this host's: only its own can be bound."""
    with socket.socket() as probe:
        try:
            probe.bind((socket.gethostbyname(address), 0))
        except OSError:
            return False
    return True


def partners(rank: int, hosts: int) -> Iterator[int]:
    """With whom a host exchanges: a few rounds in which everybody has another partner, at most one nobody."""
    size = hosts + hosts % 2  # with an odd number, the last one is nobody
    for turn in range(min(ROUNDS, size - 1)):
        if rank == size - 1:
            partner = turn
        else:
            partner = (2 * turn - rank) % (size - 1)
            partner = size - 1 if partner == rank else partner
        if partner < hosts:
            yield partner


def _exchange(partner: int, device: torch.device, count: int) -> float:
    """GiB per second in each direction; the first, small exchange makes the connection and waits for the partner."""
    _swap(partner, torch.zeros(1, device=device))
    payload = torch.zeros(count // 4, device=device)
    return count * _REPEATS / 2**30 / _timed(lambda: _swap(partner, payload), device)


def _swap(partner: int, payload: torch.Tensor) -> None:
    received = torch.empty_like(payload)
    pair = [torch_dist.P2POp(torch_dist.isend, payload, partner), torch_dist.P2POp(torch_dist.irecv, received, partner)]
    for work in torch_dist.batch_isend_irecv(pair):
        work.wait()


def _all_reduce(rank: int, hosts: int, device: torch.device, count: int) -> dict[str, Any]:
    payload = torch.full((count // 4,), float(rank + 1), device=device)
    torch_dist.all_reduce(payload)
    expected = hosts * (hosts + 1) / 2
    if not bool((payload == expected).all()):
        low, high = float(payload.min()), float(payload.max())
        return {"problem": f"the sum over all hosts is {low:g} to {high:g}, not {expected:g}"}
    payload.zero_()
    seconds = _timed(lambda: torch_dist.all_reduce(payload), device)
    return {"all_reduce_gib_per_second": round(count * _REPEATS / 2**30 / seconds, 4)}


def _timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of a few repetitions."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(_REPEATS):
        action()
    _wait(device)
    return time.perf_counter() - start


def main(arguments: list[str]) -> int:
    """Print MARK and the answer as JSON; an error becomes ``{"problem": ...}``."""
    try:
        answer = measure(json.loads(arguments[0]))
    except Exception as error:  # whatever it is: the launcher names the host and says it
        answer = {"problem": f"{type(error).__name__}: {error}".splitlines()[0]}
    sys.stdout.write(f"{MARK} {json.dumps(answer)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

__all__ = ["MARK", "SIZES", "Sizes", "is_here", "main", "measure", "partners", "products"]
