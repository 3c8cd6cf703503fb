"""Does the host have as many devices as the hostfile gives it ranks?"""

from __future__ import annotations

from typing import Any

from launch.checks.base import HostCheck
from launch.devices import listed_devices
from launch.hostfile import Host
from launch.plan import LaunchPlan


class Devices(HostCheck):
    """Counts without torch. Without a hostfile, the ranks already follow this machine's devices."""

    name = "devices"

    def look(self, question: Any) -> int:
        del question
        return listed_devices()

    def judge(self, plan: LaunchPlan, host: Host, answer: Any) -> str:
        missing = [device for device in host.devices if isinstance(device, int) and device >= answer]
        if not plan.needs_gpus or not missing or (plan.hostfile is None and len(plan.hosts) == 1):
            return ""
        return f"has {answer or 'no'} GPU{'s' if answer > 1 else ''}, but the hostfile gives it {host.slots} ranks"
