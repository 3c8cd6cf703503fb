"""Can the host write where the run writes, and does it have the room, shared memory and open files that ranks need?"""

from __future__ import annotations

import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

from launch.checks.base import HostCheck, Launch
from launch.hostfile import Host
from pipeline.config.room import bytes_below, existing_parent

_GIB = 1024**3
SHARED_BYTES_PER_RANK = 64 << 20
"""NCCL's buffers between ranks of a host; the whole of what a container gets by default."""
OPEN_FILES = 1024
_SHARED = Path("/dev/shm")


class Resources(HostCheck):
    """Looks at folders without creating any."""

    name = "resources"

    def question(self, launch: Launch) -> dict[str, str]:
        """What each folder is -> its path."""
        folders = {"run_dir": launch.plan.run_dir}
        if launch.recipe.data.cache_dir is not None:
            folders["data.cache_dir"] = Path(launch.recipe.data.cache_dir)
        return {name: str(path.absolute()) for name, path in folders.items()}  # hosts look from another folder

    def look(self, question: Any) -> dict[str, Any]:
        folders = {name: _folder(Path(path)) for name, path in question.items()}
        shared = shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else None
        return {"folders": folders, "shared": shared, "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}

    def judge(self, launch: Launch, host: Host, answer: Any) -> str:
        wrong = [f"cannot write {name}: {found['problem']}" for name, found in answer["folders"].items()]
        reasons = [text for text in wrong if not text.endswith(": ")]
        cache, most = answer["folders"].get("data.cache_dir"), launch.recipe.data.cache_gib
        if cache is not None and cache["bytes"] < most * _GIB:
            has = cache["bytes"] / _GIB
            reasons.append(
                f"has {has:.1f} GiB for data.cache_dir, less than data.cache_gib={most:g}; free space, or lower it"
            )
        shared, needed = answer["shared"], SHARED_BYTES_PER_RANK * host.slots
        if launch.plan.needs_gpus and host.slots > 1 and shared is not None and shared < needed:
            reasons.append(
                f"has {shared >> 20} MiB of {_SHARED}, {host.slots} ranks need {needed >> 20}; start its container with"
                " --shm-size=8g or --ipc=host"
            )
        if launch.marker is not None and answer["open_files"] < OPEN_FILES:
            reasons.append(
                f"lets a process open {answer['open_files']} files, fewer than {OPEN_FILES}; raise it (ulimit -n, or"
                " /etc/security/limits.conf)"
            )
        return "; ".join(reasons)


def _folder(path: Path) -> dict[str, Any]:
    """Why it cannot be written, and the bytes that are free or its own."""
    there = existing_parent(path)
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        return {"problem": f"{there}: {error.strerror}", "bytes": 0}
    return {"problem": "", "bytes": shutil.disk_usage(there).free + bytes_below(path)}


__all__ = ["OPEN_FILES", "SHARED_BYTES_PER_RANK", "Resources"]
