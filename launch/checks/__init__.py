"""What every host must pass before any rank starts. Adding a check = a file here and a line below.

Without these a launch with one unfit host looks healthy: the ranks of the other hosts wait half an hour for it at the
rendezvous.
"""

from __future__ import annotations

from launch.checks.base import HostCheck
from launch.checks.clocks import Clocks
from launch.checks.devices import Devices
from launch.checks.files import Files
from launch.checks.inputs import Inputs
from launch.checks.port import Port
from launch.checks.resources import Resources
from launch.checks.software import Software

CHECKS: tuple[HostCheck, ...] = (Files(), Software(), Clocks(), Resources(), Devices(), Inputs(), Port())
"""In the order in which they are judged."""
READY = "slt-host-ready"
"""First word of a host's answers, one line for each check; a login shell may print other lines."""
