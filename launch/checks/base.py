"""A check of every host before any rank starts: what to look at there and how to judge it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from launch.hostfile import Host
from launch.plan import LaunchPlan
from pipeline.config.schema import Recipe

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Launch:
    """What the hosts are checked for."""

    plan: LaunchPlan
    recipe: Recipe
    marker: Path | None = None
    """A file just created in the run directory; None when only this machine takes part."""


class HostCheck(ABC):
    """One check of every host. `look` runs on all hosts at once, the rest where the launcher runs.

    Questions and answers travel as JSON. Nothing here may import torch: hosts are asked before anything heavy starts.
    """

    name: ClassVar[str]
    """Key of its question and its answer."""
    blames_host: ClassVar[bool] = True
    """False: the reason is about the command, not about one host, and becomes a RecipeError."""

    def question(self, launch: Launch) -> Any:
        """What `look` needs to know."""
        del launch

    @abstractmethod
    def look(self, question: Any) -> Any:
        """The host's answer. An exception refuses the host; its text is the reason."""

    def judge(self, launch: Launch, host: Host, answer: Any) -> str:
        """Why the host cannot take part, as the end of a sentence that starts with its name; empty if it can."""
        del launch, host, answer
        return ""

    def compare(self, launch: Launch, answers: Mapping[str, Any]) -> dict[str, str]:
        """Host -> why it does not fit the others, as in `judge`; asked of several hosts only."""
        del launch, answers
        return {}


def odd_ones(answers: Mapping[str, T], mine: T) -> tuple[T, list[str]]:
    """The value of most hosts, and the hosts that have another; where two values are equally frequent, ``mine``."""
    counts = Counter(answers.values())
    usual = max(counts, key=lambda value: (counts[value], value == mine))
    return usual, [host for host, value in answers.items() if value != usual]


__all__ = ["HostCheck", "Launch", "odd_ones"]
