"""Does the host have as many devices as the hostfile gives it ranks?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.checks.base import HostCheck
from launch.devices import listed_devices
from launch.hostfile import Host
from launch.plan import LaunchPlan


class Devices(HostCheck):
    """Counts without torch. Without a hostfile, the ranks already follow this machine's devices."""

    name = "devices"

    def question(self, plan: LaunchPlan, marker: Path | None) -> bool:
        """Whether it matters how many there are: asking a driver takes a second, or much longer when it hangs."""
        del marker
        return plan.needs_gpus and not (plan.hostfile is None and len(plan.hosts) == 1)

    def look(self, question: Any) -> int:
        return listed_devices() if question else 0

    def judge(self, plan: LaunchPlan, host: Host, answer: Any) -> str:
        missing = [device for device in host.devices if isinstance(device, int) and device >= answer]
        if not missing or not self.question(plan, None):
            return ""
        return f"has {answer or 'no'} GPU{'s' if answer > 1 else ''}, but the hostfile gives it {host.slots} ranks"
