"""Ranks of this machine through torchrun, PyTorch's elastic launcher. Of several hosts each runs this command; they
find each other at a rendezvous, which also numbers their ranks."""

from __future__ import annotations

import sys

from launch.backends import Command
from launch.plan import LAUNCH_ID, LaunchPlan


def command(plan: LaunchPlan) -> Command:
    """``python -m torch.distributed.run``. It restarts nothing: what to do after a failure is the supervisor's."""
    (host,) = plan.own_hosts
    if plan.rendezvous is None:
        meet = [f"--master-addr={plan.master_addr}", f"--master-port={plan.master_port}"]
    else:
        endpoint, name = plan.rendezvous
        meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={name}"]
    argv = [sys.executable, "-u", "-m", "torch.distributed.run", f"--nnodes={len(plan.hosts)}"]
    argv += [f"--nproc-per-node={host.slots}", "--max-restarts=0", *meet, str(plan.script), *plan.arguments]
    # ranks that were asked to use the CPU must not find a GPU there
    shown = "-1" if plan.accelerator == "cpu" else ",".join(map(str, host.devices))
    return Command(
        argv=tuple(argv),
        env={**plan.env, LAUNCH_ID: plan.launch_id, "CUDA_VISIBLE_DEVICES": shown},
    )


__all__ = ["command"]
