"""Carries a command to another host, through any program that reaches it and any login shell.

The shell expands and splits words. So it reads only two paths (the interpreter and `launch/arrive.py`); everything
else travels in one encoded word.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.load import PROJECT_ROOT
from pipeline.errors import RecipeError

ARRIVE_SCRIPT = PROJECT_ROOT / "launch" / "arrive.py"


@dataclass(frozen=True, slots=True)
class HostCommand:
    """A command for every host of a launch; its variables are added to those of a login there."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    """Where it runs; None = the login's folder."""
    node_rank_at: int | None = None
    """Position in ``argv`` where each host inserts ``--node_rank=N``; None = nowhere."""


def shell_line(command: HostCommand) -> str:
    """The line that makes a host's shell run the command with exactly these arguments and variables.

    With ``node_rank_at``, whoever carries it adds the host's ``--node_rank=N`` as the last word.

    Raises:
        RecipeError: as `shell_words`; or the path of the interpreter or the project holds a control character, which
            not every shell can read.
    """
    return " ".join(shell_word(word) for word in shell_words(command))


def shell_words(command: HostCommand) -> tuple[str, ...]:
    """As `shell_line`, as words, for what starts a command on other hosts without a shell.

    Raises:
        RecipeError: a value holds a NUL byte, which no process can receive.
    """
    values = [*command.argv, *command.env, *command.env.values(), str(command.folder or "")]
    for value in values:
        if "\0" in value:
            raise RecipeError(f"{value!r} holds a NUL byte, which no argument, variable or path can; remove it")
    split = len(command.argv) if command.node_rank_at is None else command.node_rank_at
    parcel: dict[str, object] = {
        "before": [_bytes(part) for part in command.argv[:split]],
        "after": [_bytes(part) for part in command.argv[split:]],
        "env": {_bytes(name): _bytes(value) for name, value in command.env.items()},
        "folder": "" if command.folder is None else _bytes(str(command.folder)),
    }
    return (sys.executable, "-I", str(ARRIVE_SCRIPT), _encoded(parcel))


def shell_word(text: str) -> str:
    """Text as one word for a shell. Raises RecipeError for control characters."""
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise RecipeError(f"{text!r} cannot be named to other hosts: it holds a control character; rename the folder")
    return shlex.quote(text)


def _bytes(text: str) -> str:
    """The bytes this system would pass to a process, one character per byte, because JSON has no bytes."""
    return os.fsencode(text).decode("latin-1")


def _encoded(parcel: Mapping[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(parcel).encode()).decode()


__all__ = ["ARRIVE_SCRIPT", "HostCommand", "shell_line", "shell_word", "shell_words"]
