"""A check of one host before any rank starts: what to look at there and how to judge it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from launch.hostfile import Host
from launch.plan import LaunchPlan


class HostCheck(ABC):
    """One check of every host. `look` runs on all hosts at once, the rest where the launcher runs.

    Questions and answers travel as JSON. Nothing here may import torch: hosts are asked before anything heavy starts.
    """

    name: ClassVar[str]
    """Key of its question and its answer."""
    blames_host: ClassVar[bool] = True
    """False: the reason is about the command, not about one host, and becomes a RecipeError."""

    def question(self, plan: LaunchPlan, marker: Path | None) -> Any:
        """What `look` needs to know.

        Args:
            plan: the launch.
            marker: a file just created in the run directory; None when only this machine takes part.
        """
        del plan, marker

    @abstractmethod
    def look(self, question: Any) -> Any:
        """The host's answer. An exception refuses the host; its text is the reason."""

    @abstractmethod
    def judge(self, plan: LaunchPlan, host: Host, answer: Any) -> str:
        """Why the host cannot take part, as the end of a sentence that starts with its name; empty if it can."""
