"""Who is named after the trial of the hosts; real trials are in tests/multiproc/test_host_health.py."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import health
from launch.backends import Command
from launch.health import check_health, health_level, judge, summary
from launch.hostfile import Host
from launch.plan import LaunchPlan, plan_ranks
from launch.preflight import UnfitHostsError
from pipeline.engine.host_health import MARK
from pipeline.errors import RecipeError


def plan(*names: str, slots: int = 1) -> LaunchPlan:
    hosts = tuple(Host(name, tuple(range(slots))) for name in names)
    return LaunchPlan(Path("x"), (), Path("run"), hosts, plan_ranks(hosts, names[0], 29500), "id7", needs_gpus=True)


def device(tflops: float = 600.0, **changes: Any) -> dict[str, Any]:
    return {"tflops": tflops, "sums": [1.0, 2.0], "sound": True, **changes}


def answer(rate: float = 20.0, **changes: Any) -> dict[str, Any]:
    return {"devices": {"0": device(**changes)}, "gib_per_second": rate, "all_reduce_gib_per_second": rate / 2}


def test_levels() -> None:
    assert health_level(None, plan("a", "b")) == "quick" and health_level(None, plan("a")) == "off"
    assert (
        health_level(None, replace(plan("a", "b"), needs_gpus=False)) == "off"
        and health_level("full", plan("a")) == "full"
    )
    with pytest.raises(RecipeError, match="--health must be full, quick or off, got deep"):
        health_level("deep", plan("a"))
    joined = replace(plan("a", "b"), node_rank=1)
    assert health_level(None, joined) == health_level("off", joined) == "off"
    with pytest.raises(RecipeError, match="--health full needs one launcher that reaches all hosts"):
        health_level("full", joined)


def test_sound_hosts() -> None:
    answers = {"a": answer(), "b": answer(tflops=590), "c": answer(rate=18)}
    assert judge(plan("a", "b", "c"), answers) == {}
    assert summary(answers) == "trial of 3 hosts: 590 to 600 TFLOP/s per device, all-reduce 9 GiB/s"
    assert summary({"a": {"devices": {"0": device()}}}) == "trial of 1 hosts: 600 to 600 TFLOP/s per device"


def test_hosts_that_are_named() -> None:
    hosts = plan("a", "b", "c", "d", "e", "f")
    assert judge(
        hosts,
        {
            "a": answer(), "b": answer(tflops=500), "c": answer(sums=[1.0, 3.0]), "d": answer(sound=False),
            "e": answer(rate=3), "f": {"problem": "gave no result within 9 s"},
        },
    ) == {
        "b": "GPU 0 reaches 500 TFLOP/s, the median is 600",
        "c": "GPU 0 computes another product than the others",
        "d": "GPU 0 computes NaN or another result each time",
        "e": "exchanges 3 GiB/s with the others, the median is 20",
        "f": "gave no result within 9 s",
    }  # fmt: skip


def test_one_device_of_several() -> None:
    both = {"devices": {"0": device(), "1": device(), "2": {"problem": "CUDA out of memory"}}}
    slow = {"devices": {"0": device(), "1": device(tflops=10), "2": device()}}
    assert judge(plan("a", "b", slots=3), {"a": both, "b": slow}) == {
        "a": "GPU 2 CUDA out of memory", "b": "GPU 1 reaches 10 TFLOP/s, the median is 600",
    }  # fmt: skip
    assert judge(plan("a", "b"), {"a": answer(rate=20), "b": answer(rate=2)}) == {}, "of two, who is slow?"


def test_only_the_devices_of_the_launch_are_judged() -> None:
    """`--exclude b:0` leaves out the very device that is broken."""
    hosts = (Host("a", (0, 1)), Host("b", (1, 2)))
    partly = replace(plan("a", "b"), hosts=hosts, ranks=plan_ranks(hosts, "a", 29500))
    assert health._question(partly, "quick", here=False)["devices"] == [1, 0, 2], "all have the first one"
    broken = {"problem": "CUDA error"}
    answers = {
        "a": {"devices": {"0": device(), "1": device(), "2": broken}},
        "b": {"devices": {"0": broken, "1": device(), "2": device()}},
    }
    assert judge(partly, answers) == {}
    del answers["b"]["devices"]["2"]
    assert judge(partly, answers) == {"b": "torch finds no GPU 2"}


def test_the_trial_of_some_devices_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torch counts from 0 what CUDA_VISIBLE_DEVICES shows it."""
    said = '{"devices": {"0": {"tflops": 1, "sums": [1], "sound": true}, "1": {"problem": "fell off the bus"}}}'
    (tmp_path / "python").write_text(
        f"#!/bin/sh\necho $CUDA_VISIBLE_DEVICES $3 >'{tmp_path}/asked'\necho '{MARK} {said}'"
    )
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(health.sys, "executable", str(tmp_path / "python"))
    some = replace(plan("localhost"), hosts=(Host("localhost", (5, "GPU-12ab")),))
    with pytest.raises(UnfitHostsError, match="  localhost: GPU GPU-12ab fell off the bus"):
        check_health(Command(argv=("true",)), some, "quick")
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("5,GPU-12ab {") and '"devices": [0, 1]' in asked


def by(script: str) -> Command:
    return Command(argv=("true",), remote=("sh", "-c", script, "{command}"))


def test_the_trial_names_the_host_and_the_way_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = '{"devices": {"0": {"tflops": 1.5, "sums": [1], "sound": true}}}'
    script = f"""echo 'a: login banner'; echo 'a: {MARK} {said}'; echo 'b: Killed' >&2"""
    with pytest.raises(UnfitHostsError) as caught:
        check_health(by(script), plan("a", "b"), "quick")
    assert str(caught.value) == (
        "1 of 2 hosts failed the trial, nothing was started:\n  b: did not finish the trial: Killed\n"
        "Look at them (nvidia-smi, dmesg), go on without them (--exclude-bad), or skip this (--health off)."
    )
    assert caught.value.hosts == ("b",)
    with caplog.at_level(logging.INFO):
        check_health(by(f"echo 'a: {MARK} {said}'; echo 'b: {MARK} {said}'"), plan("a", "b"), "quick")
    assert "trial of 2 hosts: 1.5 to 1.5 TFLOP/s per device" in caplog.text
    check_health(by("exit 1"), plan("a", "b"), "off")
    monkeypatch.setitem(health._SECONDS, "quick", 0.3)
    with pytest.raises(UnfitHostsError, match=r"  all 2 hosts: gave no result within 0\.3 s"):
        check_health(by("exec sleep 9"), plan("a", "b"), "quick")


def test_the_trial_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(health.sys, "executable", "/bin/echo")
    with pytest.raises(UnfitHostsError, match="  localhost: did not finish the trial: -m pipeline"):
        check_health(Command(argv=("true",)), plan("localhost"), "full")
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 9")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setitem(health._SECONDS, "quick", 0.2)
    monkeypatch.setattr(health.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UnfitHostsError, match="  localhost: gave no result within"):
        check_health(Command(argv=("true",)), plan("localhost"), "quick")
