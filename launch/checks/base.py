"""A check of one host before any rank starts: what to look at there, and what follows from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from launch.hostfile import Host
from launch.plan import LaunchPlan


class HostCheck(ABC):
    """One look at a host. `look` runs on every host at the same time, the rest where the launcher runs.

    Questions and answers travel as JSON. Nothing here may import torch: hosts are asked before anything heavy starts.
    """

    name: ClassVar[str]
    """Key of its question and its answer."""
    blames_host: ClassVar[bool] = True
    """False: the reason is about the command, not about one host, and is raised by itself as a RecipeError."""

    def question(self, plan: LaunchPlan, marker: Path | None) -> Any:
        """What `look` has to know.

        Args:
            plan: of the launch.
            marker: a file that was just made in the run directory; None when this machine alone takes part.
        """
        del plan, marker

    @abstractmethod
    def look(self, question: Any) -> Any:
        """What the host says. An exception keeps the host out, with its text as the reason."""

    @abstractmethod
    def judge(self, plan: LaunchPlan, host: Host, answer: Any) -> str:
        """Why the host cannot take part, as the rest of a sentence that begins with its name; empty when it can."""
