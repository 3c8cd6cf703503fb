"""What a SLURM allocation gives a launch, read from the variables that SLURM sets in a job. No SLURM is asked, except
to expand the list of nodes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launch.hostfile import Host
from pipeline.errors import ClusterError, RecipeError

# Below the ports that systems hand out by themselves. Two jobs on one node have different ids, so different ports.
_FIRST_PORT, _PORTS = 12000, 20000


@dataclass(frozen=True, slots=True)
class Allocation:
    """The nodes of a job, and what it may use on each."""

    job_id: str
    """Empty for one that is only planned."""
    nodes: tuple[str, ...]
    tasks_per_node: int
    """0 = the job does not say."""
    gpus_per_node: int
    cpus_per_node: int
    """0 = the job does not say."""
    restarts: int = 0
    """How often the job was requeued."""
    is_batch: bool = False
    """Whether this process runs in the job's batch script."""

    def __str__(self) -> str:
        return f"SLURM job {self.job_id}" if self.job_id else "the job"

    @property
    def port(self) -> int:
        """Where the ranks of this job meet, unless told otherwise."""
        return _FIRST_PORT + int(self.job_id or 0) % _PORTS

    def hosts(self, ranks: int | None, gpus: bool) -> tuple[Host, ...]:
        """The nodes with their ranks: ``ranks`` on each; else one per GPU, or on CPUs one per task.

        Raises:
            RecipeError: the job has no GPU, or fewer CPUs or GPUs than ranks.
        """
        known = self.gpus_per_node if gpus else self.tasks_per_node or 1
        count = ranks or known
        if not count:
            raise RecipeError(
                f"ranks on GPUs, but {self} has none (SLURM_GPUS_ON_NODE is not set); submit it with "
                "--gpus-per-node=N, say how many there are with --num-procs N, or use --accelerator cpu"
            )
        if gpus and 0 < self.gpus_per_node < count:
            raise RecipeError(
                f"--num-procs {count} needs {count} GPUs on every node, but {self} has "
                f"{self.gpus_per_node} (SLURM_GPUS_ON_NODE); submit it with --gpus-per-node={count}"
            )
        if 0 < self.cpus_per_node < count:
            raise RecipeError(
                f"{count} ranks on every node need a processor core each, but {self} has "
                f"{self.cpus_per_node} per node (SLURM_JOB_CPUS_PER_NODE); submit it with --cpus-per-task=N"
            )
        return tuple(Host(node, tuple(range(count))) for node in self.nodes)


def read_allocation(environ: Mapping[str, str], expand: Callable[[str], list[str]] | None = None) -> Allocation:
    """The allocation that this process runs in.

    Args:
        environ: this process's variables.
        expand: a list of nodes such as ``n[1-2]`` -> their names; None asks `scontrol`, also for the nodes that the job
            still has: it may have lost some (``--no-kill``), which its variables do not say.

    Raises:
        RecipeError: there is none, or its nodes differ in tasks.
        ClusterError: SLURM's commands do not work here.
    """
    job_id, nodelist = environ.get("SLURM_JOB_ID"), environ.get("SLURM_JOB_NODELIST")
    if not job_id or not nodelist:
        raise RecipeError(
            "--backend slurm runs inside an allocation, but SLURM_JOB_ID and SLURM_JOB_NODELIST are not set; submit a "
            "job with `slt launch submit`, or get one with `salloc --nodes=N --gpus-per-node=M`"
        )
    tasks = expand_counts(environ.get("SLURM_TASKS_PER_NODE", "")) if "SLURM_NTASKS" in environ else []
    if len(set(tasks)) > 1:
        raise RecipeError(
            f"SLURM_TASKS_PER_NODE={environ['SLURM_TASKS_PER_NODE']}: the nodes of this job have different numbers of "
            "tasks; submit it with --ntasks-per-node=N"
        )
    return Allocation(
        job_id=job_id,
        nodes=tuple(expand(nodelist) if expand else hostnames(_present(job_id))),
        tasks_per_node=tasks[0] if tasks else 0,
        gpus_per_node=_gpus(environ),
        cpus_per_node=min(expand_counts(environ.get("SLURM_JOB_CPUS_PER_NODE", "")), default=0),
        restarts=int(environ.get("SLURM_RESTART_COUNT", "0")),
        is_batch=environ.get("ENVIRONMENT") == "BATCH",
    )


def expand_counts(text: str) -> list[int]:
    """SLURM's short form of one number per node: ``8(x2),4`` -> 8, 8, 4."""
    numbers = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        numbers += [int(number)] * int(times or 1)
    return numbers


def hostnames(nodelist: str) -> list[str]:
    """Names of the nodes of a list such as ``n[1-2]``, in the order in which SLURM numbers its tasks.

    Raises:
        ClusterError: `scontrol` is missing or fails.
    """
    return _scontrol("hostnames", nodelist).split()


def _present(job_id: str) -> str:
    for word in _scontrol("job", job_id, "-o").split():
        if word.startswith("NodeList="):
            return word.removeprefix("NodeList=")
    raise ClusterError(f"`scontrol show job {job_id}` names no NodeList")


def _scontrol(*what: str) -> str:
    argv = ["scontrol", "show", *what]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"`{' '.join(argv)}` does not work here, and the ranks need it: {error}") from error
    if done.returncode:
        raise ClusterError(f"`{' '.join(argv)}` failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def _gpus(environ: Mapping[str, str]) -> int:
    """GPUs of the job on every node; SLURM sets one or the other variable, depending on how they were requested."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        if match := re.search(r"(\d+)$", environ.get(name, "")):  # may be preceded by a type: a100:4
            return int(match[1])
    listed = environ.get("SLURM_STEP_GPUS") or environ.get("SLURM_JOB_GPUS") or ""
    return len([number for number in listed.split(",") if number])


__all__ = ["Allocation", "expand_counts", "hostnames", "read_allocation"]
