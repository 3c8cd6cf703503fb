"""Plans a launch with its command, on all hosts of its options or without some of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from dataclasses import dataclass

from launch.backends import Command, get_backend
from launch.hostfile import Host
from launch.options import LaunchOptions, build_plan, load_for, planned_hosts
from launch.plan import LaunchPlan
from pipeline.config.load import LoadedRecipe
from pipeline.config.resolve import ResolvedRecipe
from pipeline.errors import ClusterError, RecipeError


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything of one attempt."""

    plan: LaunchPlan
    resolved: ResolvedRecipe
    command: Command
    loaded: LoadedRecipe
    """The recipe as it was read, once for all attempts: whoever edits the file has the next run in mind."""


class TooFewHostsError(ClusterError):
    """Not enough hosts are left, or their number does not divide the batch."""


def prepare(options: LaunchOptions, inputs: bool = False) -> Prepared:
    """Plan for all hosts of the options.

    Raises:
        RecipeError: as `build_plan`.
    """
    loaded = load_for(options, inputs)
    plan, resolved = build_plan(options, os.environ, inputs=inputs, loaded=loaded)
    return Prepared(plan, resolved, command_of(options, plan), loaded)


def prepare_again(options: LaunchOptions, first: Prepared, without: Collection[str], min_hosts: int) -> Prepared:
    """Plan the same launch anew: for as many as the recipe can run on of the hosts that the options name now, without
    some of them.

    Args:
        options: of the launch.
        first: an earlier plan of it, whose recipe and launch id stay.
        without: names of hosts that take no part.
        min_hosts: how many there must be.

    Raises:
        RecipeError: the hosts cannot be read.
        TooFewHostsError: fewer than ``min_hosts`` are left, or no number of them fits the recipe.
    """
    left = [host for host in _hosts_now(options, first) if host.name not in without]
    if options.master_addr in without:
        options = dataclasses.replace(options, master_addr=None)
    plan, resolved = _largest(options, first.loaded, left, max(min_hosts, 1))
    plan = dataclasses.replace(plan, launch_id=first.plan.launch_id)  # which the lock of the run directory names
    return Prepared(plan, resolved, command_of(options, plan), first.loaded)


def _hosts_now(options: LaunchOptions, first: Prepared) -> tuple[Host, ...]:
    if options.backend != "slurm" or not (options.include or options.exclude):
        return planned_hosts(options, os.environ, first.loaded)
    # a job may have lost nodes that the filters name
    everything = dataclasses.replace(options, include="", exclude="")
    there = {host.name for host in planned_hosts(everything, os.environ, first.loaded)}
    return tuple(host for host in first.plan.hosts if host.name in there)


def command_of(options: LaunchOptions, plan: LaunchPlan) -> Command:
    """The command of a plan, by the backend of the options."""
    return get_backend(options.backend or ("deepspeed" if options.hostfile else "local")).command(plan)


def _largest(
    options: LaunchOptions, loaded: LoadedRecipe, left: list[Host], min_hosts: int
) -> tuple[LaunchPlan, ResolvedRecipe]:
    names = ", ".join(host.name for host in left) or "none"
    if len(left) < min_hosts:
        raise TooFewHostsError(f"{len(left)} hosts are left ({names}), fewer than --min-hosts {min_hosts}")
    problem = ""
    for count in range(len(left), min_hosts - 1, -1):
        try:
            return build_plan(_only(options, left[:count]), os.environ, loaded=loaded)
        except RecipeError as error:
            problem = problem or str(error)
    raise TooFewHostsError(f"no {min_hosts} to {len(left)} of the hosts that are left ({names}) can go on: {problem}")


def _only(options: LaunchOptions, hosts: list[Host]) -> LaunchOptions:
    if options.hostfile is None and options.backend != "slurm":  # this machine alone
        return options
    chosen = "@".join(f"{host.name}:{','.join(map(str, host.devices))}" for host in hosts)
    return dataclasses.replace(options, include=chosen, exclude="")


__all__ = ["Prepared", "TooFewHostsError", "command_of", "prepare", "prepare_again"]
