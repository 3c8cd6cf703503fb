"""`slt launch plan|run`: shows or runs a launch. Starts in well under a second; never imports torch."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from launch.attempts import Care, Finished, run
from launch.backends import Command
from launch.carry import HostCommand
from launch.hang import Limits
from launch.manifest import manifest_command
from launch.memory import planned_memory, print_memory
from launch.options import LaunchOptions, build_plan, with_options
from launch.plan import LaunchPlan
from launch.prepare import command_of, prepare
from launch.processes import Patience
from launch.recovery import RestartPolicy
from launch.requeue import requeue
from launch.run_options import RunOptions
from launch.signals import StopBeforeStart, StoppedBeforeStart
from launch.slurm import read_allocation
from launch.status_cli import status_command, stop_command
from launch.submit import submit_command
from launch.supervise import log_name
from pipeline.config.cli import run_app
from pipeline.config.planner import Answer, too_large
from pipeline.config.resolve import ResolvedRecipe
from pipeline.errors import EXIT_PREEMPTED, RecipeError
from shards.terminal import table_console

app = typer.Typer(no_args_is_help=True, help="Start a run on this machine or on many.")
app.command(name="submit", epilog="Example: slt launch submit RECIPE --nodes 2 --gpus-per-node 8 --time 24:00:00")(
    submit_command
)
app.command(name="status", epilog="Example: slt launch status runs/demo/connector")(status_command)
app.command(name="stop", epilog="Example: slt launch stop runs/demo/connector")(stop_command)
app.command(
    name="manifest", epilog="Example: slt launch manifest RECIPE --kind kubernetes --nodes 2 --gpus-per-node 8"
)(manifest_command)
log = logging.getLogger(__name__)


@app.command(name="plan", epilog="Example: slt launch plan demo_connector --num-procs 2")
@with_options(LaunchOptions)
def plan_command(
    options: LaunchOptions, as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False
) -> None:
    """Print the exact command, its environment and the rank table; start nothing."""
    plan, resolved = build_plan(options, os.environ)
    command = command_of(options, plan)
    memory = planned_memory(plan, resolved)
    if as_json:
        answer = dataclasses.asdict(memory) if isinstance(memory, Answer) else {"not_planned": memory}
        shown = {**_as_dict(plan, resolved, command), **({"memory": answer} if memory else {})}
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
        return
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    train = resolved.recipe.train
    console.print(f"# {resolved.recipe.name}: stage {resolved.recipe.stage}, run_dir {plan.run_dir}")
    size = train.sequence_parallel
    groups = f"{plan.world_size} ranks" if size == 1 else f"{plan.world_size // size} groups of {size} ranks"
    console.print(
        f"# global_batch {train.global_batch} = micro_batch {train.micro_batch} x {groups}"
        f" x {resolved.accumulation_steps} accumulation_steps"
    )
    console.print("# its recipe.resolved.yaml is written by `slt launch run`, before it starts the ranks")
    sys.stdout.flush()
    # as bytes: rich would drop control characters, and a path need not be text
    sys.stdout.buffer.write(b"".join(os.fsencode(line) + b"\n" for line in _shown(command)))
    sys.stdout.buffer.flush()
    table = Table("rank", "host", "node_rank", "local_rank", "device", "master")
    for rank in plan.ranks:
        fields = (rank.rank, rank.host, rank.node_rank, rank.local_rank, rank.device, "{}:{}".format(*rank.master))
        table.add_row(*map(str, fields))
    table_console(highlight=False, markup=False).print(table)
    if isinstance(memory, Answer):
        print_memory(memory, plan.world_size)
        if memory.fits is False:
            raise RecipeError(too_large(memory, plan.world_size))
        console.print(f"# {memory.reason}" if memory.fits else "# no verdict: name the GPU's memory with --gpu-memory")
    elif memory and not resolved.zero_choice:  # which was logged with the reason, as a setting depends on it
        console.print(f"# memory is not planned: {memory}")


@app.command(name="run", epilog="Example: slt launch run demo_connector --num-procs 2 --set train.steps=20")
@with_options(RunOptions)
def run_command(options: RunOptions) -> None:
    """Check recipe and hosts for this many ranks, start them, and return the worst rank's exit code."""
    policy = RestartPolicy(options.max_restarts, options.min_hosts, options.restart_delay)
    care = Care(Patience(options.grace_seconds), Limits(options.hang_seconds), policy)
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    try:
        with StopBeforeStart() as early:
            raise typer.Exit(_run(options, care, console, early))
    except StoppedBeforeStart as stopped:
        console.print(f"{stopped} (exit code {stopped.exit_code})")
        raise typer.Exit(stopped.exit_code) from stopped


def _run(options: RunOptions, care: Care, console: Console, early: StopBeforeStart) -> int:
    started = prepare(options, inputs=True)
    plan, name = started.plan, started.resolved.recipe.name
    console.print(
        f"{name}: {plan.world_size} ranks on {plan.where}, log {plan.run_dir}/logs/{log_name(plan.node_rank)}"
    )
    try:
        finished = run(options, care, early, console.print, started)
    except StoppedBeforeStart as stopped:  # a job that waits for its hosts goes back into the queue, too
        early.over = True
        finished = Finished(stopped.exit_code, [f"{stopped} (exit code {stopped.exit_code})"], plan.run_dir)
    for line in finished.lines:
        console.print(line)
    if finished.code == EXIT_PREEMPTED and options.backend == "slurm":
        requeue(read_allocation(os.environ), plan.run_dir, options.max_requeues, console.print)
    return finished.code


def _shown(command: Command) -> Iterator[str]:
    """The command of the ranks in shell syntax; then the command that carries it to their hosts."""
    arrives = command.arrives or HostCommand(command.argv, command.env)
    for key, value in sorted(arrives.env.items()):
        yield f"export {key}={shlex.quote(value)}"
    if arrives.folder is not None:
        yield f"cd {shlex.quote(str(arrives.folder))}"
    yield shlex.join(arrives.argv)
    if command.arrives is not None:
        yield "# carried to every host, which adds its --node_rank, by"
        yield " ".join(
            [*(f"{key}={shlex.quote(value)}" for key, value in command.env.items()), shlex.join(command.argv)]
        )


def _as_dict(plan: LaunchPlan, resolved: ResolvedRecipe, command: Command) -> dict[str, object]:
    arrives = command.arrives or HostCommand(command.argv, command.env)
    return {
        "recipe": resolved.recipe.name,
        "stage": resolved.recipe.stage,
        "run_dir": str(plan.run_dir),
        "world_size": plan.world_size,
        "accumulation_steps": resolved.accumulation_steps,
        "argv": list(arrives.argv),
        "env": dict(arrives.env),
        "folder": str(arrives.folder or Path.cwd()),
        "started_by": {"argv": list(command.argv), "env": command.env},
        "ranks": [dataclasses.asdict(rank) for rank in plan.ranks],
    }


def main() -> NoReturn:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    run_app(app)


if __name__ == "__main__":
    main()

__all__ = ["app", "main"]
