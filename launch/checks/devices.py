"""Does the host have as many devices as it gets ranks, and are they free?"""

from __future__ import annotations

import logging
import os
from typing import Any

from launch.checks.base import HostCheck, Launch
from launch.devices import listed_devices, memory_of_devices, visible_devices
from launch.hostfile import Host

log = logging.getLogger(__name__)

TAKEN_GIB = 2.0
"""More than this in use before the start is another process, not the driver."""


class Devices(HostCheck):
    """Counts without torch. Without a hostfile, the ranks already follow this machine's devices."""

    name = "devices"

    def question(self, launch: Launch) -> bool:
        """Whether it matters how many there are: asking a driver takes a second, or much longer when it hangs."""
        return launch.plan.needs_gpus

    def look(self, question: Any) -> dict[str, Any]:
        """How many, which of them this process may use, and of each its number, UUID, GiB in use, GiB in all and the
        processes that hold them."""
        count = listed_devices() if question else 0
        shown = visible_devices(os.environ, count) if question else ()
        return {"count": count, "shown": shown, "devices": memory_of_devices() if question else []}

    def judge(self, launch: Launch, host: Host, answer: Any) -> str:
        plan = launch.plan
        if not plan.needs_gpus:
            return ""
        # a scheduler gives a job some devices of a node, and the plan counts these from 0
        scheduled = plan.hostfile is None and launch.marker is not None
        names, count = (answer["shown"], len(answer["shown"])) if scheduled else (host.devices, answer["count"])
        missing = [device for device in host.devices if isinstance(device, int) and device >= count]
        if missing and (plan.hostfile is not None or len(plan.hosts) > 1):
            who = "job" if scheduled else "hostfile"
            return f"has {count or 'no'} GPU{'s' if count > 1 else ''}, but the {who} gives it {host.slots} ranks"
        chosen = [names[device] if scheduled and isinstance(device, int) else device for device in host.devices]
        taken = [
            f"GPU {number} has {used:.1f} of {total:.0f} GiB in use ({', '.join(by) or 'nobody it names'})"
            for number, uuid, used, total, by in answer["devices"]
            if used > TAKEN_GIB and (number in chosen or uuid in chosen)
        ]
        if not taken:
            return ""
        fix = "end those processes, or leave the device out (--exclude HOST:DEVICE, CUDA_VISIBLE_DEVICES)"
        reason = f"has devices in use: {'; '.join(taken)}; {fix}"
        if launch.marker is None:  # one's own machine, whose screen may need one, too
            log.warning("this machine %s", reason)
            return ""
        return reason


__all__ = ["TAKEN_GIB", "Devices"]
