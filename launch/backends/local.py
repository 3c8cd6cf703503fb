"""Ranks on this machine through DeepSpeed's own launcher, without a hostfile."""

from __future__ import annotations

from launch.backends import Command
from launch.backends.node import node_command
from launch.plan import LaunchPlan
from pipeline.errors import RecipeError


def command(plan: LaunchPlan) -> Command:
    """``python -m deepspeed.launcher.launch``, which starts one process per device."""
    if len(plan.hosts) != 1:
        raise RecipeError(f"--backend local runs on this machine only, got {len(plan.hosts)} hosts; use deepspeed")
    node = node_command(plan, "critical")
    return Command(argv=node.argv, env=dict(node.env))


__all__ = ["command"]
