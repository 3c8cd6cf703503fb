"""`slt launch submit`: writes a SLURM batch script of one command, `slt launch run --backend slurm`, and submits it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from launch.arguments import arguments_of
from launch.options import build_plan, with_options
from launch.plan import LaunchPlan
from launch.run_options import RunOptions
from launch.slurm import Allocation
from pipeline.errors import ClusterError, RecipeError, StorageError
from shards.atomic import write_atomic

_SIGNAL = "Ask the run to save so many seconds before its time limit."
_TASKS = "Ranks on every node (default: one per GPU, or one)."
_UNUSED = ("hostfile", "ssh_port", "num_procs", "backend", "node_rank", "rdzv_endpoint")
_LEAVE_SECONDS = 15  # between the end of the grace time and the time limit


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOptions(RunOptions):
    """The command line of a submission."""

    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs on every node, one rank each.")] = 0
    tasks_per_node: Annotated[int | None, typer.Option(min=1, help=_TASKS)] = None
    time: Annotated[str | None, typer.Option(help="Time limit, such as 24:00:00 or 2-00:00:00.")] = None
    partition: Annotated[str | None, typer.Option(help="SLURM partition.")] = None
    account: Annotated[str | None, typer.Option(help="SLURM account.")] = None
    qos: Annotated[str | None, typer.Option(help="SLURM quality of service.")] = None
    constraint: Annotated[str | None, typer.Option(help="Features that the nodes must have.")] = None
    mem: Annotated[str | None, typer.Option(help="Memory of every node, such as 200G; 0 = all of it.")] = None
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="Processor cores of every rank.")] = None
    job_name: Annotated[str | None, typer.Option(help="Default: the recipe's name.")] = None
    signal_seconds: Annotated[int, typer.Option(min=_LEAVE_SECONDS + 1, help=_SIGNAL)] = 300
    sbatch_arg: Annotated[list[str] | None, typer.Option(help="Any other --option=value; may be repeated.")] = None

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1


@with_options(SubmitOptions)
def submit_command(
    options: SubmitOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; write and submit nothing.")] = False,
) -> None:
    """Check recipe and inputs, write RUN_DIR/launch/submit.sbatch, and submit it to SLURM."""
    plan, name = _checked(options)
    script = batch_script(options, plan.run_dir, name)
    if dry_run:
        sys.stdout.write(script)
        return
    job = submit(script, plan.run_dir)
    run_dir = shlex.quote(str(plan.run_dir))
    typer.echo(
        f"job {job} submitted: {plan.world_size} ranks on {options.nodes} nodes, {plan.run_dir}/launch/submit.sbatch\n"
        f"  squeue --job {job}\n"
        f"  tail -F {run_dir}/logs/slurm-{job}.log\n"
        f"  slt launch status {run_dir}\n"
        f"  slt launch stop {run_dir}    # saves first; `scancel {job}` may not"
    )


def _checked(options: SubmitOptions) -> tuple[LaunchPlan, str]:
    """The plan of the job as it will be, and the recipe's name; everything is checked that can be before it runs."""
    for name in _UNUSED:
        if getattr(options, name) is not None:
            fix = "; say --tasks-per-node" if name == "num_procs" else ""
            raise RecipeError(f"--{name.replace('_', '-')} has no meaning for a job that SLURM places{fix}")
    nodes = tuple(f"node-{number}" for number in range(options.nodes))
    job = Allocation("", nodes, options.ranks_per_node, options.gpus_per_node, cpus_per_node=0)
    plan, resolved = build_plan(options, os.environ, inputs=True, job=job)
    return plan, resolved.recipe.name


def batch_script(options: SubmitOptions, run_dir: Path, recipe_name: str) -> str:
    """The text of the script: settings of the job, then the launch, which takes the script's place and its signals."""
    name = options.job_name or recipe_name
    log = str(run_dir.absolute() / "logs" / "slurm-").replace("%", "%%") + "%j.log"
    settings = "\n".join(f"#SBATCH {_setting(key, value)}" for key, value in _requests(options))
    return f"""#!/bin/bash
# Written by `slt launch submit`. Edit it as you like, then: sbatch {shlex.quote(str(run_dir / "launch"))}/submit.sbatch
#SBATCH {_setting("job-name", name)}
{settings}
#SBATCH {_setting("chdir", str(Path.cwd()))}
# All starts of this job write to one log.
#SBATCH {_setting("output", log)}
#SBATCH --open-mode=append
# After a pre-emption or a failed node the job queues again and goes on from its last checkpoint.
#SBATCH --requeue
# One lost node does not end the job: the launch goes on with the others if it may.
#SBATCH --no-kill
# So many seconds before the time limit the launch saves and puts the job back into the queue.
#SBATCH --signal=B:USR1@{options.signal_seconds}

exec {shlex.join(_launch(options))}
"""


def submit(script: str, run_dir: Path) -> str:
    """Write the script into the run directory and submit it; returns the job's number.

    Raises:
        StorageError: the run directory cannot be written.
        ClusterError: SLURM refuses, or is not there.
    """
    path = run_dir / "launch" / "submit.sbatch"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (run_dir / "logs").mkdir(exist_ok=True)  # SLURM does not make the folder of its log
        write_atomic(path, script)
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error.strerror}; nothing was submitted") from error
    argv = ["sbatch", "--parsable", str(path)]
    # variables of a job that this command may run in would become settings of the new one
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    env.update({name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ})
    try:
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise ClusterError(
            f"sbatch cannot be started here: {error.strerror}; {path} is written, submit it where it can"
        ) from error
    if done.returncode:
        raise ClusterError(f"sbatch refused {path}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]


def _requests(options: SubmitOptions) -> Iterator[tuple[str, str]]:
    given = {
        "nodes": options.nodes,
        "ntasks-per-node": options.ranks_per_node,
        "gpus-per-node": options.gpus_per_node or None,
        **{name.replace("_", "-"): getattr(options, name) for name in ("cpus_per_task", "mem", "time")},
        **{name: getattr(options, name) for name in ("partition", "account", "qos", "constraint")},
    }
    yield from ((name, str(value)) for name, value in given.items() if value is not None)
    for text in options.sbatch_arg or []:
        match = re.fullmatch(r"--([a-z-]+)(?:=(.*))?", text)
        if match is None:
            raise RecipeError(f"--sbatch-arg {text}: write it as --sbatch-arg=--name=value")
        yield match[1], match[2] or ""


def _setting(name: str, value: str) -> str:
    """``--name=value`` as sbatch reads it from a script."""
    if '"' in value or any(ord(character) < 32 for character in value):
        raise RecipeError(f"{value!r} cannot be written into a batch script (quotation mark or control character)")
    plain = re.fullmatch(r"[\w./:%@,=+-]*", value) is not None
    return f"--{name}" + (f"={value}" if plain else f'="{value}"') if value else f"--{name}"


def _launch(options: SubmitOptions) -> list[str]:
    """The command of the job: this one's options, as `slt launch run` takes them."""
    slt = str(Path(sys.executable).with_name("slt"))
    arguments = [slt, "launch", "run", options.recipe, "--backend", "slurm", *arguments_of(options, ("grace_seconds",))]
    if options.tasks_per_node is not None:
        arguments += ["--num-procs", str(options.tasks_per_node)]
    return [*arguments, "--grace-seconds", f"{min(options.grace_seconds, options.signal_seconds - _LEAVE_SECONDS):g}"]


__all__ = ["SubmitOptions", "batch_script", "submit", "submit_command"]
