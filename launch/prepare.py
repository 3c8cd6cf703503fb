"""Plans a launch with its command, on all hosts of its options or without some of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from dataclasses import dataclass

from launch.backends import Command, get_backend
from launch.hostfile import Host
from launch.options import LaunchOptions, build_plan
from launch.plan import LaunchPlan
from pipeline.config.resolve import ResolvedRecipe
from pipeline.errors import ClusterError, RecipeError


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything of one attempt."""

    plan: LaunchPlan
    resolved: ResolvedRecipe
    command: Command


class TooFewHostsError(ClusterError):
    """Not enough hosts are left, or their number does not divide the batch."""


def prepare(
    options: LaunchOptions, without: Collection[str] = (), min_hosts: int = 1, inputs: bool = False
) -> Prepared:
    """Plan for the hosts of the options, without some of them: for as many of the rest as the recipe can run on.

    Raises:
        RecipeError: as `build_plan`.
        TooFewHostsError: fewer than ``min_hosts`` are left, or no number of them fits the recipe.
    """
    plan, resolved = build_plan(options, os.environ, inputs=inputs)
    if without:
        left = [host for host in plan.hosts if host.name not in without]
        if options.master_addr in without:
            options = dataclasses.replace(options, master_addr=None)
        plan, resolved = _largest(options, left, max(min_hosts, 1))
    return Prepared(plan, resolved, command_of(options, plan))


def command_of(options: LaunchOptions, plan: LaunchPlan) -> Command:
    """The command of a plan, by the backend of the options."""
    return get_backend(options.backend or ("deepspeed" if options.hostfile else "local")).command(plan)


def _largest(options: LaunchOptions, left: list[Host], min_hosts: int) -> tuple[LaunchPlan, ResolvedRecipe]:
    names = ", ".join(host.name for host in left) or "none"
    if len(left) < min_hosts:
        raise TooFewHostsError(f"{len(left)} hosts are left ({names}), fewer than --min-hosts {min_hosts}")
    problem = ""
    for count in range(len(left), min_hosts - 1, -1):
        try:
            return build_plan(_only(options, left[:count]), os.environ)
        except RecipeError as error:
            problem = problem or str(error)
    raise TooFewHostsError(f"no {min_hosts} to {len(left)} of the hosts that are left ({names}) can go on: {problem}")


def _only(options: LaunchOptions, hosts: list[Host]) -> LaunchOptions:
    chosen = "@".join(f"{host.name}:{','.join(map(str, host.devices))}" for host in hosts)
    return dataclasses.replace(options, include=chosen, exclude="")


__all__ = ["Prepared", "TooFewHostsError", "command_of", "prepare"]
