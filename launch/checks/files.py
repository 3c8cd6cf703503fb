"""Does the host see the script, the folder and the run directory of the launch?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from launch.checks.base import HostCheck, Launch
from launch.hostfile import Host


class Files(HostCheck):
    """A run directory is shared if the host sees a file created there a moment ago."""

    name = "files"

    def question(self, launch: Launch) -> list[tuple[str, str]]:
        """Paths, each with the reason to give if the host lacks it."""
        plan, marker = launch.plan, launch.marker
        if marker is None:
            return []
        return [
            (str(plan.script), f"has no {plan.script}"),
            (str(Path.cwd()), f"has no folder {Path.cwd()}"),
            (str(marker), f"sees another {marker.parent.parent}: run_dir must be on storage that all hosts share"),
        ]

    def look(self, question: Any) -> str:
        return next((reason for path, reason in question if not os.path.exists(path)), "")

    def judge(self, launch: Launch, host: Host, answer: Any) -> str:
        del launch, host
        return str(answer)
