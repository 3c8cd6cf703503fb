"""Hostfiles in DeepSpeed's syntax (``name slots=N``), and the include / exclude filters over them.

    # one line per host, in rank order
    worker-0 slots=8
    worker-1 slots=8     # comments may follow

Stricter than DeepSpeed where that would start something unintended: text after the slots, zero slots and host names
that a shell or the filter syntax could misread are errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.names import nearest
from pipeline.errors import RecipeError

_LINE = re.compile(r"^(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\d+)$")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


@dataclass(frozen=True, slots=True)
class Host:
    """A machine and its devices in this run: numbers, or UUIDs on this machine."""

    name: str
    devices: tuple[int | str, ...]

    @property
    def slots(self) -> int:
        return len(self.devices)


def read_hostfile(path: str | Path) -> tuple[Host, ...]:
    """Hosts in file order, which is rank order.

    Raises:
        RecipeError: lists every bad line as ``file:line``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows editors add a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"hostfile {path} cannot be read: {error}") from error
    return parse_hostfile(text, str(path))


def parse_hostfile(text: str, label: str = "hostfile") -> tuple[Host, ...]:
    """As `read_hostfile`, from text."""
    hosts: dict[str, Host] = {}
    lines: dict[str, int] = {}
    problems = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.match(line)
        if match is None:
            problems.append(f"{label}:{number}: {line!r} is not of the form `name slots=N`")
            continue
        name, slots = match["name"], int(match["slots"])
        if not _NAME.match(name):
            hint = "; give the user in ~/.ssh/config" if "@" in name else " (letters, digits, dot, dash, underscore)"
            problems.append(f"{label}:{number}: {name!r} is not a host name{hint}")
        elif name in hosts:
            problems.append(f"{label}:{number}: host {name} is listed twice (first in line {lines[name]})")
        elif slots < 1:
            problems.append(f"{label}:{number}: host {name} has no slots; give at least 1 or remove the line")
        else:
            hosts[name], lines[name] = Host(name, tuple(range(slots))), number
    if not hosts and not problems:
        problems.append(f"{label}: names no host; write one line `name slots=N` per machine")
    if problems:
        raise RecipeError("\n".join(problems))
    return tuple(hosts.values())


def filter_hosts(hosts: tuple[Host, ...], include: str = "", exclude: str = "") -> tuple[Host, ...]:
    """Keep or drop hosts and devices, in DeepSpeed's syntax ``name[:device[,device...]][@name...]``.

    The result has the order of the hostfile, not of the filter.

    Raises:
        RecipeError: both filters given, an unknown host or device, or nothing left.
    """
    if include and exclude:
        raise RecipeError("--include and --exclude cannot be combined; write one of them")
    if not include and not exclude:
        return hosts
    option = "--include" if include else "--exclude"
    chosen = _parse_filter(include or exclude, hosts, option)
    kept = []
    for host in hosts:
        named = chosen.get(host.name)
        if include:
            devices = named or ()
        else:
            devices = tuple(device for device in host.devices if named is None or device not in named)
        if devices:
            kept.append(Host(host.name, devices))
    if not kept:
        raise RecipeError(f"{option} {include or exclude} leaves no device to run on")
    return tuple(kept)


def _parse_filter(text: str, hosts: tuple[Host, ...], option: str) -> dict[str, tuple[int | str, ...]]:
    known = {host.name: host for host in hosts}
    chosen: dict[str, tuple[int | str, ...]] = {}
    for part in text.split("@"):
        name, colon, numbers = part.strip().partition(":")
        if name not in known:
            raise RecipeError(f"{option} {text}: there is no host {name!r}{nearest(name, known)}")
        devices = known[name].devices
        if colon:
            if not re.fullmatch(r"\d+(,\d+)*", numbers):
                raise RecipeError(f"{option} {text}: {numbers!r} is not a list of device numbers such as 0,2")
            devices = tuple(int(number) for number in numbers.split(","))
            unknown = [device for device in sorted(map(int, numbers.split(","))) if device not in known[name].devices]
            if unknown:
                raise RecipeError(f"{option} {text}: host {name} has slots={known[name].slots}, no device {unknown[0]}")
        devices_so_far = {*chosen.get(name, ()), *devices}
        chosen[name] = tuple(device for device in known[name].devices if device in devices_so_far)
    return chosen


__all__ = ["Host", "filter_hosts", "parse_hostfile", "read_hostfile"]
