"""Who this process is and how it talks to the others. Only this file and ``pipeline/engine`` touch
``torch.distributed``, DeepSpeed's communication or ``os.environ``; everything else takes rank and world size as ints.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import nn

from pipeline.errors import ClusterError

logger = logging.getLogger(__name__)

_host_groups: list[torch_dist.ProcessGroup] = []

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place in the job."""

    rank: int
    local_rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Read the launcher's variables; without any of them this is a job of one process.

    Raises:
        ClusterError: some but not all of RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set.
    """
    present = [name for name in _RANK_VARIABLES if name in os.environ]
    if not present:
        return Ranks(0, 0, 1)
    missing = [name for name in _RANK_VARIABLES if name not in os.environ]
    if missing:
        raise ClusterError(
            f"the environment sets {', '.join(present)} but not {', '.join(missing)}; "
            "a rank needs all five. Start it with `slt launch run`, `deepspeed` or `torchrun`."
        )
    return Ranks(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]))


def uses_cuda() -> bool:
    """Whether ranks train on CUDA devices: some exist, and nobody chose the CPU.

    Raises:
        ClusterError: GPUs were requested, but torch finds none; training would silently use the CPU.
    """
    requested = os.environ.get("DS_ACCELERATOR", "")
    if requested == "cuda" and not torch.cuda.is_available():
        raise ClusterError(
            f"GPUs are requested (DS_ACCELERATOR=cuda), but torch {torch.__version__} finds none on this host; install "
            "a build of torch for its driver, or use the CPU (--accelerator cpu, or DS_ACCELERATOR=cpu)"
        )
    return requested != "cpu" and torch.cuda.is_available()


def device_for(ranks: Ranks) -> torch.device:
    """The accelerator of this local rank, or the CPU."""
    if uses_cuda():
        return torch.device("cuda", ranks.local_rank)
    return torch.device("cpu")


def choose_accelerator() -> None:
    """Tell DeepSpeed, before its import, to use the CPU if there is no CUDA; else it probes and warns."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def init() -> Ranks:
    """Join the job's process group (NCCL on CUDA, gloo elsewhere) through DeepSpeed; safe to call again.

    A job of one process without launcher variables gets a private rendezvous, so that ``slt train`` works alone. A rank
    that waits for another gives up after 30 minutes; DEEPSPEED_TIMEOUT sets other minutes.

    Raises:
        ClusterError: the ranks cannot reach each other.
    """
    ranks = ranks_from_environment()
    cuda = uses_cuda()
    choose_accelerator()
    import deepspeed
    import deepspeed.ops

    if not cuda:
        # DeepSpeed would JIT-compile its shared-memory all-reduce (a minute of g++), which training never calls and
        # which hangs forever on a stale build lock.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch_dist.is_initialized():
        return Ranks(torch_dist.get_rank(), ranks.local_rank, torch_dist.get_world_size())
    if "RANK" not in os.environ:
        _single_process_environment()
    if cuda:
        torch.cuda.set_device(ranks.local_rank)
    timeout = datetime.timedelta(minutes=float(os.environ.get("DEEPSPEED_TIMEOUT", "30")))
    try:
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=timeout, verbose=False)
        _make_host_group(timeout)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise ClusterError(
                f"port {os.environ['MASTER_PORT']}, where the ranks meet, is in use on this host, perhaps by another "
                "run; choose another one (`slt launch run --master-port N`, else MASTER_PORT)"
            ) from error
        raise ClusterError(
            f"rank {ranks.rank} of {ranks.world_size} cannot join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']}: {error}\nAll hosts must reach that address. If the error shows 127.0.0.1 or "
            f"127.0.1.1, name the interface they share: {'NCCL_SOCKET_IFNAME=eth0 ' if cuda else ''}"
            "GLOO_SOCKET_IFNAME=eth0."
        ) from error
    return ranks


def _make_host_group(timeout: datetime.timedelta) -> None:
    """The group of what the hosts tell each other: gloo beside NCCL, so that it never passes through a device."""
    if torch_dist.get_world_size() > 1 and torch_dist.get_backend() != "gloo":
        interface = os.environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
        if interface in [name for _, name in socket.if_nameindex()]:  # NCCL also takes prefixes and exceptions
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        _host_groups.append(torch_dist.new_group(backend="gloo", timeout=timeout))


def _host_group() -> torch_dist.ProcessGroup | None:
    """None = the default group, which is of the host itself."""
    return _host_groups[-1] if _host_groups else None


def _single_process_environment() -> None:
    """The five variables for a world of one on a free port; DeepSpeed would otherwise look for MPI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def shutdown() -> None:
    """Leave the process group, if this process is in one."""
    _host_groups.clear()
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def world_size() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def rank() -> int:
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Wait for the hosts, not for their devices. All ranks must call."""
    if world_size() > 1:
        torch_dist.barrier(group=_host_group())


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place and returned. All ranks must call with equal shapes."""
    if world_size() > 1:
        torch_dist.all_reduce(value, op=torch_dist.ReduceOp.SUM)
    return value


def all_reduce_max(value: torch.Tensor) -> torch.Tensor:
    """Maximum over ranks, in place and returned. All ranks must call with equal shapes."""
    if world_size() > 1:
        torch_dist.all_reduce(value, op=torch_dist.ReduceOp.MAX)
    return value


def host_counts(counts: Sequence[int]) -> list[list[int]]:
    """Every rank's whole numbers, in rank order, on every rank. All ranks must call with equally many.

    They travel between hosts alone (gloo): no device is asked, so none is waited for.
    """
    return _of_ranks(torch.tensor(counts, dtype=torch.int64))


def host_numbers(values: Sequence[float]) -> list[list[float]]:
    """As `host_counts`, for numbers with fractions."""
    return _of_ranks(torch.tensor(values, dtype=torch.float64))


def _of_ranks(mine: torch.Tensor) -> list[list[Any]]:
    of_rank = [torch.empty_like(mine) for _ in range(world_size())]
    if world_size() == 1:
        of_rank = [mine]
    else:
        torch_dist.all_gather(of_rank, mine, group=_host_group())
    return [numbers.tolist() for numbers in of_rank]


def gather_as_one(module: nn.Module) -> None:
    """ZeRO-3 gathers the weights of all parts of a module together, once per call of the module, from now on.

    So ranks may call the parts unequally often.
    """
    from deepspeed.utils import set_z3_leaf_module

    set_z3_leaf_module(module, True)


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """Neighbouring ranks that compute every sequence together, each a slice of its positions; by default no others."""

    rank: int = 0
    """Which slice this rank computes."""
    size: int = 1
    handle: torch_dist.ProcessGroup | None = None


def sequence_group(size: int) -> SequenceGroup:
    """The group of this rank: ranks 0 to ``size`` - 1, and so on. All ranks must call; ``size`` divides the world."""
    if size == 1:
        return SequenceGroup()
    groups = [torch_dist.new_group(list(range(first, first + size))) for first in range(0, world_size(), size)]
    return SequenceGroup(rank() % size, size, groups[rank() // size])


class _ExchangeParts(torch.autograd.Function):
    """All-to-all along dim 0, which is its own backward."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        torch_dist.all_to_all_single(received, parts.contiguous(), group=group.handle)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _ExchangeParts.apply(grads[0], ctx.group), None


def exchange_parts(parts: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """[R, ...], a part for every rank of the group -> [R, ...], the part that each of them had for this one.

    Differentiable. All ranks of the group must call with equal shapes.
    """
    exchanged: torch.Tensor = _ExchangeParts.apply(parts, group)
    return exchanged


def any_rank(flag: bool) -> bool:
    """True on every rank if it is True on one; as `host_counts`. All ranks must call."""
    return any(flags[0] for flags in host_counts([int(flag)]))


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Rank ``source``'s object on every rank, between hosts alone: a rank may exit as soon as it returns. All ranks
    must call; only for our own small objects (it pickles)."""
    if world_size() == 1:
        return value
    holder = [value]
    torch_dist.broadcast_object_list(holder, src=source, group=_host_group())
    return holder[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's object, in rank order, on every rank. All ranks must call; for small objects (it pickles)."""
    if world_size() == 1:
        return [value]
    holder: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(holder, value, group=_host_group())
    return holder


def gather_rows(local: torch.Tensor) -> torch.Tensor:
    """[B, ...] of every rank -> [R*B, ...] in rank order, without gradient. All ranks must call with equal shapes."""
    if world_size() == 1:
        return local
    gathered = local.new_empty((world_size() * local.shape[0], *local.shape[1:]))
    # torch 2.13 renamed both collectives, and warns of the names that 2.11 has
    gather = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor
    gather(gathered, local.contiguous())
    return gathered


def scatter_sum(rows: torch.Tensor) -> torch.Tensor:
    """[R*B, ...] of every rank -> their sum over ranks, of which each keeps its own [B, ...]: the gradient of
    `gather_rows`. All ranks must call with equal shapes."""
    if world_size() == 1:
        return rows
    own = rows.new_empty((rows.shape[0] // world_size(), *rows.shape[1:]))
    scatter = getattr(torch_dist, "reduce_scatter_single", None) or torch_dist.reduce_scatter_tensor
    scatter(own, rows.contiguous())
    return own
