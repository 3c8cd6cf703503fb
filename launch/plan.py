"""Assigns ranks to hosts and devices: pure functions of hosts and ports. No ssh, no torch, no environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from launch.hostfile import Host
from launch.notes import LAUNCH_ID


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One process of the run."""

    rank: int
    local_rank: int
    node_rank: int
    host: str
    device: int | str
    """Device number on its host, or its UUID (ignored by CPU ranks)."""
    world_size: int
    master: tuple[str, int]
    """Address and port where the ranks meet."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Everything a backend needs to form its command."""

    script: Path
    """The script of every rank."""
    arguments: tuple[str, ...]
    """Arguments of the script: the resolved recipe and its sha256."""
    run_dir: Path
    hosts: tuple[Host, ...]
    ranks: tuple[RankPlan, ...]
    launch_id: str
    env: dict[str, str] = field(default_factory=dict)
    """Variables every rank gets on every host."""
    hostfile: Path | None = None
    ssh_port: int | None = None
    accelerator: str = "unknown"
    """``cpu``, ``gpu``, or ``unknown`` for hosts that were not checked."""
    needs_gpus: bool = False
    """Whether every rank needs its own GPU."""
    node_rank: int | None = None
    """Every host has a launcher of its own, and this is that of host number ``node_rank``; the first leads. None = this
    one starts the ranks of all hosts."""
    rendezvous: tuple[str, str] | None = None
    """Torchrun on several hosts: where their launchers find each other (``host:port``), and the name of their job."""
    cpus_per_rank: int = 0
    """Processor cores that a scheduler gives every rank; 0 = no scheduler does."""

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def leads(self) -> bool:
        """Whether this launcher holds the run directory and writes the recipe."""
        return self.node_rank in (None, 0)

    @property
    def where(self) -> str:
        """The hosts with their numbers of ranks, to show."""
        return ", ".join(f"{host.name} x {host.slots}" for host in self.hosts)

    @property
    def own_hosts(self) -> tuple[Host, ...]:
        """The hosts whose ranks this launcher starts."""
        return self.hosts if self.node_rank is None else (self.hosts[self.node_rank],)

    @property
    def master_port(self) -> int:
        return self.ranks[0].master[1]

    @property
    def master_addr(self) -> str:
        return self.ranks[0].master[0]


def plan_ranks(hosts: tuple[Host, ...], master_addr: str, master_port: int) -> tuple[RankPlan, ...]:
    """One entry per rank, in the order of the hosts.

    As in DeepSpeed's launcher, local_rank = rank modulo the host's slots. If hosts differ in slots, local ranks do not
    simply count up from 0 on each host.
    """
    world_size = sum(host.slots for host in hosts)
    places = [(node, host) for node, host in enumerate(hosts) for _ in host.devices]
    plans = []
    for rank, (node, host) in enumerate(places):
        local = rank % host.slots
        meet = (master_addr, master_port)
        plans.append(RankPlan(rank, local, node, host.name, host.devices[local], world_size, meet))
    return tuple(plans)


def threads_per_rank(cores: int, ranks_on_host: int) -> int:
    """OMP_NUM_THREADS such that the ranks of a host share its cores without oversubscription."""
    return max(1, cores // max(1, ranks_on_host))


__all__ = ["LAUNCH_ID", "LaunchPlan", "RankPlan", "plan_ranks", "threads_per_rank"]
