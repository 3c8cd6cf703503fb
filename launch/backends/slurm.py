"""Ranks on the nodes of a SLURM allocation, one task of `srun` each; no ssh.

Nothing here may send a signal to `srun` itself: on SIGTERM it kills its tasks at once, and they could not save. The
supervisor signals the ranks through ``remote``, a second step beside that of the ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch.backends import Command
from launch.carry import HostCommand, shell_words
from launch.plan import LAUNCH_ID, LaunchPlan
from pipeline.errors import RecipeError

# SLURM itself ends the step of a node that it gives up
_LOST = r"^srun: error: Node failure on ([^ ,]+)"
# A job's own settings must not change these: no MPI, no task killed because another failed (the supervisor lets it
# save first), every step beside all others, the whole environment.
_EVERY_STEP = ("--overlap", "--mpi=none", "--input=none", "--export=ALL", "--kill-on-bad-exit=0", "--wait=0")


def command(plan: LaunchPlan) -> Command:
    """`srun` with one task per rank on the plan's hosts, which may be fewer than the allocation has."""
    slots = {host.slots for host in plan.hosts}
    if len(slots) > 1:
        raise RecipeError("--backend slurm starts equally many ranks on every node; leave out those with fewer")
    (per_node,) = slots
    nodes = [host.name for host in plan.hosts]
    srun = ("srun", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", *_EVERY_STEP)
    places = ",".join(f"{host.name}:{host.slots}" for host in plan.hosts)
    rank = HostCommand(
        argv=(
            *(sys.executable, "-u", "-m", "launch.slurm_task", plan.master_addr, str(plan.master_port), places),
            *(sys.executable, "-u", str(plan.script), *plan.arguments),
        ),
        # ranks that were asked to use the CPU must not find a GPU there
        env={
            **plan.env,
            LAUNCH_ID: plan.launch_id,
            **({"CUDA_VISIBLE_DEVICES": "-1"} if plan.accelerator == "cpu" else {}),
        },
        folder=Path.cwd(),
    )
    # Without --label: it would break long lines, which are reports of ranks. Nothing about GPUs: by default a step has
    # those of the job and shows them to every task; --gpu-bind=none would hide which ones they are (SLURM 22.05).
    tasks = (f"--ntasks={plan.world_size}", f"--ntasks-per-node={per_node}", "--distribution=block")
    cpus = (f"--cpus-per-task={plan.cpus_per_rank}",) if plan.cpus_per_rank else ()
    return Command(
        argv=(*srun, *tasks, *cpus, *shell_words(rank)),
        arrives=rank,
        remote=(*srun, f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--label", "sh", "-c", "{command}"),
        labels={str(number): node for number, node in enumerate(nodes)},
        piece_bytes=1024,
        lost_host=_LOST,
    )


__all__ = ["command"]
