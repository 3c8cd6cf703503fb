"""A plan whose hosts have passed every check before the start; without the unfit ones, if the user wants that."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from launch.backends import Command, get_backend
from launch.health import check_health, health_level
from launch.memory import check_memory
from launch.options import LaunchOptions, build_plan
from launch.plan import LaunchPlan
from launch.preflight import UnfitHostsError, check_hosts
from launch.run_options import RunOptions
from pipeline.config.resolve import ResolvedRecipe

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A launch that is planned, but not started."""

    plan: LaunchPlan
    resolved: ResolvedRecipe
    command: Command


def prepare(options: LaunchOptions, without: Collection[str] = (), launch_id: str | None = None) -> Prepared:
    """Plan a launch after checking all that this machine can tell.

    Args:
        options: the command line.
        without: hosts to leave out.
        launch_id: of a launch that is planned again; None for a new one.

    Raises:
        RecipeError: as `build_plan`.
    """
    plan, resolved = build_plan(options, os.environ, inputs=True, without=without)
    if launch_id is not None:
        plan = dataclasses.replace(plan, launch_id=launch_id)
    return Prepared(plan, resolved, command_of(options, plan))


def command_of(options: LaunchOptions, plan: LaunchPlan) -> Command:
    """The command of a plan, by the backend that the options name."""
    return get_backend(options.backend or ("deepspeed" if options.hostfile else "local")).command(plan)


def ready(prepared: Prepared, options: RunOptions, without: Collection[str] = (), min_hosts: int = 1) -> Prepared:
    """The launch on hosts that have passed: the same, or with ``--exclude-bad`` one on the hosts that remain.

    Args:
        prepared: the launch as it was planned.
        options: the command line.
        without: hosts that ``prepared`` leaves out.
        min_hosts: how many must remain.

    Raises:
        UnfitHostsError: hosts cannot take part, and must or cannot be left out.
        RecipeError: the recipe does not fit into the GPUs, or the command itself is wrong.
    """
    while True:
        plan = prepared.plan
        try:
            with ThreadPoolExecutor(1) as pool:  # the planner imports torch meanwhile
                memory = pool.submit(check_memory, plan, prepared.resolved)
                check_hosts(prepared.command, plan, prepared.resolved.recipe)
                memory.result()
            check_health(prepared.command, plan, health_level(options.health, plan))
            return prepared
        except UnfitHostsError as unfit:
            if not options.exclude_bad or len(plan.hosts) - len(unfit.hosts) < max(min_hosts, 1):
                raise
            without = (*without, *unfit.hosts)
            prepared = prepare(options, without, plan.launch_id)
            left = ", ".join(host.name for host in prepared.plan.hosts)
            log.warning("%s\n--exclude-bad: going on with %d ranks on %s", unfit, prepared.plan.world_size, left)


__all__ = ["Prepared", "command_of", "prepare", "ready"]
