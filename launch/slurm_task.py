"""First program of every task of `srun`: tells the rank who it is, then becomes the rank.

``python -m launch.slurm_task MASTER_ADDR MASTER_PORT PLACES PROGRAM [ARGUMENT...]``; PLACES is ``n1:8,n2:8``, the ranks
of every node in order. Where SLURM placed this task elsewhere, the plan and the run would disagree: that is refused.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from launch.notes import tell
from pipeline.errors import EXIT_CLUSTER, ClusterError

_NEEDED = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURMD_NODENAME")


def rank_variables(environ: Mapping[str, str], master: tuple[str, str], places: str) -> dict[str, str]:
    """The variables of a rank, from those of its task.

    Raises:
        ClusterError: SLURM has started something else than was planned.
    """
    missing = [name for name in _NEEDED if name not in environ]
    if missing:
        raise ClusterError(f"SLURM has not set {', '.join(missing)}; only `srun` may start this program")
    rank, local, world = (int(environ[name]) for name in _NEEDED[:3])
    planned = [
        (node, number) for node, _, count in (part.partition(":") for part in places.split(","))
        for number in range(int(count))
    ]  # fmt: skip
    here = environ["SLURMD_NODENAME"]
    if world != len(planned):
        raise ClusterError(f"SLURM started {world} tasks (SLURM_NTASKS) for {len(planned)} planned ranks")
    if planned[rank] != (here, local):
        raise ClusterError(
            f"task {rank} was planned as number {planned[rank][1]} on {planned[rank][0]}, but SLURM started it as "
            f"number {local} on {here}; unset SLURM_DISTRIBUTION and SLURM_HOSTFILE"
        )
    on_node = sum(node == here for node, _ in planned)
    shown = environ.get("CUDA_VISIBLE_DEVICES", "-1")
    if shown != "-1" and len(shown.split(",")) < on_node:
        raise ClusterError(
            f"SLURM shows task {rank} only CUDA_VISIBLE_DEVICES={shown}, but {on_node} ranks run on {here} and each "
            "must see the GPUs of all, to reach them directly; submit with --gpus-per-node, without --gpus-per-task"
        )
    return {
        "RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(world),
        "MASTER_ADDR": master[0], "MASTER_PORT": master[1],
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Become the rank; returns only when that fails."""
    address, port, places, *program = arguments
    try:
        variables = rank_variables(os.environ, (address, port), places)
        os.execve(program[0], program, {**os.environ, **variables})
    except (ClusterError, OSError) as error:
        tell({"rank": int(os.environ.get("SLURM_PROCID", "0")), "code": EXIT_CLUSTER, "error": str(error)})
    return EXIT_CLUSTER


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

__all__ = ["main", "rank_variables"]
