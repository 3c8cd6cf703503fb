"""Lists the accelerators of a machine without torch.

nvidia-smi is the best source. Without it, the device files are counted, and for AMD the kernel's
list of compute nodes.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import RecipeError

VARIABLE = "CUDA_VISIBLE_DEVICES"
_SECONDS = 30.0  # nvidia-smi has to wake every device
_UUID = re.compile(r"(GPU|MIG)-[0-9A-Za-z/-]+")


def listed_devices(root: Path = Path("/")) -> int:
    """Number of GPUs of this machine, including those that the environment hides."""
    try:
        result = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        listed = re.findall(r"^GPU \d+:", result.stdout, flags=re.MULTILINE) if result.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):  # no NVIDIA tools here, or a driver that hangs
        listed = []
    if listed:
        return len(listed)
    files = [path for path in root.glob("dev/nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    return len(files) or sum(_is_gpu(path) for path in root.glob("sys/class/kfd/kfd/topology/nodes/*/gpu_id"))


def memory_of_devices() -> list[tuple[int, str, float, float, list[str]]]:
    """Number, UUID, GiB in use, GiB in all and the processes in it, of every NVIDIA GPU that nvidia-smi lists."""
    gpus = table("--query-gpu=index,uuid,memory.used,memory.total")
    processes = table("--query-compute-apps=gpu_uuid,pid,process_name") if gpus else []
    found = []
    for number, uuid, used, total in (row for row in gpus if len(row) == 4):
        holders = [f"process {row[1]}, {row[2]}" for row in processes if row[0] == uuid and len(row) == 3]
        if used.isdecimal() and total.isdecimal():  # not of a device split into instances
            found.append((int(number), uuid, int(used) / 1024, int(total) / 1024, holders))
    return found


def table(query: str) -> list[list[str]]:
    """Rows of an nvidia-smi query; none where there is no such program, or it does not answer."""
    argv = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):  # no NVIDIA tools here, or a driver that hangs
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[cell.strip() for cell in line.split(",")] for line in lines]


def visible_devices(environ: Mapping[str, str], listed: int) -> tuple[int | str, ...]:
    """The devices a process of this environment may use: numbers, or names as CUDA_VISIBLE_DEVICES gives them.

    Like CUDA, reads CUDA_VISIBLE_DEVICES up to the first entry that is not a device (-1, empty, a number too high).

    Args:
        environ: variables of the process.
        listed: number of devices of the machine; 0 = none listed, then the variable is trusted.

    Raises:
        RecipeError: a device is named twice.
    """
    if VARIABLE not in environ:
        return tuple(range(listed))
    devices: list[int | str] = []
    for entry in environ[VARIABLE].split(","):
        name = entry.strip()
        if name.isdecimal() and (not listed or int(name) < listed):
            devices.append(int(name))
        elif _UUID.fullmatch(name):
            devices.append(name)
        else:
            break
    twice = next((name for number, name in enumerate(devices) if name in devices[:number]), None)
    if twice is not None:
        raise RecipeError(f"{VARIABLE}={environ[VARIABLE]} names device {twice} twice; name each device once")
    return tuple(devices)


def _is_gpu(path: Path) -> bool:
    try:
        return path.read_text().strip() not in ("", "0")  # processors are listed too, without a GPU id
    except OSError:
        return False


__all__ = ["VARIABLE", "listed_devices", "memory_of_devices", "table", "visible_devices"]
