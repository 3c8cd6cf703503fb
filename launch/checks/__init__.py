"""What every host must pass before any rank starts. Adding a check = a file here and a line below.

Without these a launch with one unfit host looks healthy: the ranks of the other hosts wait half an hour for it at the
rendezvous.
"""

from __future__ import annotations

from launch.checks.base import HostCheck
from launch.checks.devices import Devices
from launch.checks.files import Files
from launch.checks.port import Port

CHECKS: tuple[HostCheck, ...] = (Files(), Devices(), Port())
"""In the order in which they are judged."""
READY = "slt-host-ready"
"""First word of a host's answer line; a login shell may print other lines."""
