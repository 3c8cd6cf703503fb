"""Do all hosts run the same code with the same packages? Ranks that differ fail late, or disagree without a word."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.checks.base import HostCheck, Launch, odd_ones
from pipeline.config.load import PROJECT_ROOT
from pipeline.config.resolve import installed_versions

_CODE = "sources"
_FOLDERS = ("launch", "pipeline", "shards", "ds_configs")
_NCCL = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
_DRIVER = Path("/proc/driver/nvidia/version")


class Software(HostCheck):
    """Names the host that differs from the majority; of two, the one that differs from this machine."""

    name = "software"

    def question(self, launch: Launch) -> bool:
        """Whether there is anybody to differ from."""
        return launch.marker is not None

    def look(self, question: Any) -> dict[str, str]:
        """What -> version or hash."""
        if not question:
            return {}
        found = {_CODE: source_hash(PROJECT_ROOT), "python": platform.python_version(), **installed_versions()}
        for name in _NCCL:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return found | driver_version(_DRIVER)

    def compare(self, launch: Launch, answers: Mapping[str, Any]) -> dict[str, str]:
        del launch
        mine, reasons = self.look(True), dict.fromkeys(answers, "")
        for what in dict.fromkeys(key for answer in answers.values() for key in answer):
            values = {host: answer.get(what, "not installed") for host, answer in answers.items()}
            usual, odd = odd_ones(values, mine.get(what, "not installed"))
            for host in odd:
                has = f"has {what} {values[host]}, the others {usual}"
                if what == _CODE:
                    has = f"has other code in {PROJECT_ROOT} ({values[host][:12]}, the others {usual[:12]})"
                reasons[host] += f"; {has}" if reasons[host] else has
        fix = "; bring its checkout and environment to the state of the others"
        return {host: reason + fix for host, reason in reasons.items() if reason}


def source_hash(root: Path) -> str:
    """Identity of the code that a rank runs, whatever version control says."""
    digest = hashlib.sha256()
    for folder in _FOLDERS:
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".py", ".json", ".yaml") and file.is_file():
                digest.update(file.relative_to(root).as_posix().encode() + b"\0")
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def driver_version(file: Path) -> dict[str, str]:
    """The NVIDIA kernel driver, from its own file: asking the driver itself may hang."""
    match = re.search(r"Kernel Module\s.*?\s(\d+\.[\d.]+)\s", file.read_text()) if file.is_file() else None
    return {} if match is None else {"NVIDIA driver": match[1]}


__all__ = ["Software", "driver_version", "source_hash"]
