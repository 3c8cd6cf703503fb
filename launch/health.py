"""The trial before a launch on many GPUs: which device computes wrongly or slowly, which host is hard to reach.

`pipeline.engine.host_health` measures on the hosts; here its answers are asked for and judged, without torch.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from launch.backends import Command
from launch.carry import HostCommand, shell_line
from launch.checks.base import odd_ones
from launch.devices import VARIABLE
from launch.plan import LaunchPlan
from launch.preflight import UnfitHostsError, ask, grouped
from pipeline.config.load import PROJECT_ROOT
from pipeline.errors import RecipeError

log = logging.getLogger(__name__)

LEVELS = ("full", "quick", "off")
SLOW = 0.85
"""Part of the median below which a device or a host is named."""
_MODULE = "pipeline.engine.host_health"
_MARK = "slt-host-health "
_SECONDS = {"quick": 180.0, "full": 600.0}
"""For all hosts together: most of it is the import of torch on cold storage."""
_FEW = 3  # of two hosts, none can be told to be the slow one


def health_level(wanted: str | None, plan: LaunchPlan) -> str:
    """``--health``, by default ``quick`` for GPUs of several hosts.

    Raises:
        RecipeError: another word, or a trial of hosts that this launcher does not reach.
    """
    if plan.node_rank is not None:
        if wanted not in (None, "off"):
            raise RecipeError(f"--health {wanted} needs one launcher that reaches all hosts; here each has its own")
        return "off"
    if wanted is None:
        return "quick" if plan.needs_gpus and len(plan.hosts) > 1 else "off"
    if wanted not in LEVELS:
        raise RecipeError(f"--health must be {', '.join(LEVELS[:-1])} or {LEVELS[-1]}, got {wanted}")
    return wanted


def check_health(command: Command, plan: LaunchPlan, level: str) -> None:
    """Let every host multiply, exchange and add up for a moment.

    Raises:
        UnfitHostsError: names each host that gives no or other results than the others, or is slow.
    """
    if level == "off":
        return
    here = command.remote is None
    asked = HostCommand(
        (sys.executable, "-m", _MODULE, json.dumps(_question(plan, level, here))), plan.env, PROJECT_ROOT
    )
    if here:
        (host,) = plan.hosts
        answers = {host.name: _named(plan, _answer(_run_here(plan, asked, _SECONDS[level]), _SECONDS[level]))}
    else:
        text, errors = ask(command, shell_line(asked), _SECONDS[level])
        output = {h.name: command.lines_of(h.name, errors) + command.lines_of(h.name, text) for h in plan.hosts}
        answers = {name: _answer(lines, _SECONDS[level]) for name, lines in output.items()}
    reasons = judge(plan, answers)
    if reasons:
        raise UnfitHostsError(
            f"{len(reasons)} of {len(plan.hosts)} hosts failed the trial, nothing was started:\n"
            + "\n".join(grouped(plan.hosts, {name: [reason] for name, reason in reasons.items()}))
            + "\nLook at them (nvidia-smi, dmesg), go on without them (--exclude-bad), or skip this (--health off).",
            [host.name for host in plan.hosts if host.name in reasons],
        )
    log.info("%s", summary(answers))


def judge(plan: LaunchPlan, answers: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Host -> why it cannot take part."""
    hosts = {host.name: host for host in plan.hosts}
    reasons: dict[str, list[str]] = {}
    sound: dict[tuple[str, str], dict[str, Any]] = {}
    for host, answer in answers.items():
        if "problem" in answer:
            reasons.setdefault(host, []).append(answer["problem"])
        found = answer.get("devices", {})
        if plan.needs_gpus and found:  # a host may have others, which the launch leaves alone
            planned = [str(device) for device in hosts[host].devices]
            missing = [f"torch finds no GPU {number}" for number in planned if number not in found]
            reasons.setdefault(host, []).extend(missing)
            found = {number: device for number, device in found.items() if number in planned}
        for number, device in found.items():
            if text := device.get("problem") or ("" if device["sound"] else "computes NaN or another result each time"):
                reasons.setdefault(host, []).append(f"{_device(plan, number)} {text}")
            else:
                sound[host, number] = device
    if sound:
        _, odd = odd_ones({f"{host} {number}": tuple(found["sums"]) for (host, number), found in sound.items()}, ())
        usual = statistics.median(device["tflops"] for device in sound.values())
        for (host, number), device in sound.items():
            if f"{host} {number}" in odd:
                reasons.setdefault(host, []).append(f"{_device(plan, number)} computes another product than the others")
            elif device["tflops"] < SLOW * usual:
                text = f"{_device(plan, number)} reaches {device['tflops']:.3g} TFLOP/s, the median is {usual:.3g}"
                reasons.setdefault(host, []).append(text)
    rates = {host: answer["gib_per_second"] for host, answer in answers.items() if "gib_per_second" in answer}
    usual = statistics.median(rates.values()) if len(rates) >= _FEW else 0.0
    for host, rate in rates.items():
        if rate < SLOW * usual:
            text = f"exchanges {rate:.3g} GiB/s with the others, the median is {usual:.3g}"
            reasons.setdefault(host, []).append(text)
    return {host: "; ".join(texts) for host, texts in reasons.items() if texts}


def summary(answers: Mapping[str, dict[str, Any]]) -> str:
    """One line about sound hosts."""
    devices = [device["tflops"] for answer in answers.values() for device in answer["devices"].values()]
    text = f"trial of {len(answers)} hosts: {min(devices):.3g} to {max(devices):.3g} TFLOP/s per device"
    rates = [answer["all_reduce_gib_per_second"] for answer in answers.values() if "gib_per_second" in answer]
    return f"{text}, all-reduce {min(rates):.3g} GiB/s" if rates else text


def _question(plan: LaunchPlan, level: str, here: bool) -> dict[str, Any]:
    """The same for every host: all numbers that any of them uses, and before the others those that all of them use, as
    the first one exchanges."""
    numbers = [range(host.slots) if here else [n for n in host.devices if isinstance(n, int)] for host in plan.hosts]
    common = set.intersection(*map(set, numbers))
    return {
        "level": level, "hosts": len(plan.hosts), "address": plan.master_addr, "port": plan.master_port,
        "devices": sorted({n for of_host in numbers for n in of_host}, key=lambda n: (n not in common, n)),
        "seconds": _SECONDS[level] * 0.8,
    }  # fmt: skip


def _named(plan: LaunchPlan, answer: dict[str, Any]) -> dict[str, Any]:
    """The devices that were shown to the trial on this machine, by the names that the plan has for them."""
    if not plan.needs_gpus or "devices" not in answer:
        return answer
    devices = plan.hosts[0].devices
    return {**answer, "devices": {str(devices[int(number)]): found for number, found in answer["devices"].items()}}


def _device(plan: LaunchPlan, number: str) -> str:
    return f"GPU {number}" if plan.needs_gpus else "its CPU"


def _run_here(plan: LaunchPlan, asked: HostCommand, seconds: float) -> list[str]:
    env = {**os.environ, **asked.env}
    if plan.needs_gpus:
        env[VARIABLE] = ",".join(map(str, plan.hosts[0].devices))
    try:
        done = subprocess.run(
            asked.argv, env=env, cwd=asked.folder, timeout=seconds, check=False, capture_output=True, text=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return []
    return [*done.stderr.splitlines(), *done.stdout.splitlines()]


def _answer(lines: Iterable[str], seconds: float) -> dict[str, Any]:
    """What a host measured; its last words, or its silence, as a problem."""
    said = [line for line in lines if line.strip()]
    for line in said:
        if line.startswith(_MARK):
            answer: dict[str, Any] = json.loads(line.removeprefix(_MARK))
            return answer
    return {"problem": f"did not finish the trial: {said[-1]}" if said else f"gave no result within {seconds:g} s"}


__all__ = ["LEVELS", "SLOW", "check_health", "health_level", "judge", "summary"]
