"""Do the hosts' clocks agree? Logs, rates and certificates read them, and so does whoever looks for a cause."""

from __future__ import annotations

import time
from typing import Any

from launch.checks.base import HostCheck, Launch
from launch.hostfile import Host

LIMIT_SECONDS = 5.0


class Clocks(HostCheck):
    """A host's time must lie between the moment it was asked and the moment it was judged."""

    name = "clocks"

    def question(self, launch: Launch) -> float:
        del launch
        return time.time()

    def look(self, question: Any) -> tuple[float, float]:
        """When it was asked, by the launcher's clock, and the time here."""
        return question, time.time()

    def judge(self, launch: Launch, host: Host, answer: Any) -> str:
        del launch, host
        asked, theirs = answer
        behind, ahead = asked - theirs, theirs - time.time()
        if max(behind, ahead) <= LIMIT_SECONDS:
            return ""
        off = f"{behind:.0f} s behind" if behind > ahead else f"{ahead:.0f} s ahead of"
        return f"has a clock {off} this machine's; set it by NTP (chronyc makestep)"


__all__ = ["LIMIT_SECONDS", "Clocks"]
