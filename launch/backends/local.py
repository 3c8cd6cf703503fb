"""Ranks on this machine through DeepSpeed's own launcher, without a hostfile."""

from __future__ import annotations

import os
import sys

from launch.backends import Command
from launch.plan import LAUNCH_ID, LaunchPlan
from pipeline.errors import RecipeError


def command(plan: LaunchPlan) -> Command:
    """``python -m deepspeed.launcher.runner``, which starts one process per device."""
    if len(plan.hosts) != 1:
        raise RecipeError(f"--backend local runs on this machine only, got {len(plan.hosts)} hosts; use deepspeed")
    host = plan.hosts[0]
    argv = [sys.executable, "-m", "deepspeed.launcher.runner"]
    # DeepSpeed would otherwise pick up /job/hostfile where that exists; no regular file = this machine
    argv += ["--hostfile", os.devnull]
    if plan.visible_devices:
        # the runner drops CUDA_VISIBLE_DEVICES when a count is given, and would use devices of other jobs
        argv += ["--include", f"localhost:{','.join(map(str, host.devices))}"]
    else:
        argv += ["--num_gpus", str(host.slots)]
    argv += ["--master_port", str(plan.master_port), "--no_local_rank", "--log_level", "critical"]
    argv += [str(plan.script), *plan.arguments]
    return Command(argv=tuple(argv), env={**plan.env, LAUNCH_ID: plan.launch_id})


__all__ = ["command"]
