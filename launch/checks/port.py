"""Is the port where the ranks meet free on the first host?"""

from __future__ import annotations

import socket
from typing import Any

from launch.checks.base import HostCheck, Launch
from launch.hostfile import Host


class Port(HostCheck):
    """Asks every host, because none knows whether it is the first."""

    name = "port"
    blames_host = False

    def question(self, launch: Launch) -> int:
        return launch.plan.master_port

    def look(self, question: Any) -> bool:
        return port_in_use(question)

    def judge(self, launch: Launch, host: Host, answer: Any) -> str:
        plan = launch.plan
        if not answer or (len(plan.hosts) > 1 and host.name != plan.master_addr):
            return ""
        return (
            f"port {plan.master_port} of {plan.master_addr}, where the ranks meet, is in use, perhaps by another run; "
            "nothing was started. Choose another port with --master-port"
        )


def port_in_use(port: int) -> bool:
    """Whether something on this machine listens on a TCP port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do not matter
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False
