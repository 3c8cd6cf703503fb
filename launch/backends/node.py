"""The command of every host of a launch: DeepSpeed's own launcher, which starts one process per device.

DeepSpeed's outer runner is left out. It writes folder, interpreter and variables unquoted into a shell line, takes no
devices named by UUID, and when interrupted ends every DeepSpeed launcher on its hosts.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

from launch.carry import HostCommand
from launch.plan import LAUNCH_ID, LaunchPlan


def node_command(plan: LaunchPlan, log_level: str) -> HostCommand:
    """``python -m deepspeed.launcher.launch`` for the ranks of one host, given by ``--node_rank``."""
    # the launcher makes these CUDA_VISIBLE_DEVICES; ranks that were asked to use the CPU must not find a GPU there
    devices = {host.name: [-1] * host.slots if plan.accelerator == "cpu" else host.devices for host in plan.hosts}
    world = base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()
    argv = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    node_rank_at = len(argv)
    argv += [f"--master_addr={plan.master_addr}", f"--master_port={plan.master_port}"]
    argv += ["--no_local_rank", f"--log_level={log_level}", str(plan.script), *plan.arguments]
    return HostCommand(tuple(argv), {**plan.env, LAUNCH_ID: plan.launch_id}, Path.cwd(), node_rank_at)


__all__ = ["node_command"]
