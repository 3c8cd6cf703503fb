"""Hosts that fail a check are left out if the user wants that; else nothing starts."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from launch import ready as module
from launch.plan import LaunchPlan
from launch.preflight import UnfitHostsError
from launch.prepare import Prepared, TooFewHostsError, prepare
from launch.ready import ready
from launch.run_options import RunOptions
from pipeline.errors import RecipeError


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hosts that fail; the plans that were checked follow ``checked ``."""
    names: list[str] = []

    def check(command: object, plan: LaunchPlan, *_: object) -> None:
        found = [host.name for host in plan.hosts if host.name in names]
        if found:
            raise UnfitHostsError(f"{', '.join(found)} cannot take part", found)

    monkeypatch.setattr(module, "check_hosts", check)
    monkeypatch.setattr("launch.options.check_recipe", lambda loaded, sizes: None)
    return names


def options(folder: Path, exclude_bad: bool = True) -> RunOptions:
    (folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in "abcde"))
    sets = [f"run_dir={folder}/run", "train.global_batch=16", "train.micro_batch=2", "train.world_sizes=[4]"]
    return RunOptions(
        recipe="demo_connector",
        hostfile=folder / "hosts",
        sets=sets,
        include="a@b@c@d",
        exclude_bad=exclude_bad,
        master_addr="a",
        accelerator="cpu",
    )


def names(prepared: Prepared) -> list[str]:
    return [host.name for host in prepared.plan.hosts]


def test_nothing_starts_with_a_bad_host(tmp_path: Path, bad: list[str]) -> None:
    wanted = options(tmp_path, exclude_bad=False)
    first = prepare(wanted)
    assert ready(first, wanted) is first
    bad.append("c")
    with pytest.raises(UnfitHostsError, match="c cannot take part"):
        ready(first, wanted)


def test_a_launcher_on_every_host_leaves_none_out(tmp_path: Path, bad: list[str]) -> None:
    wanted = options(tmp_path)
    first = prepare(wanted)
    joined = replace(first, plan=replace(first.plan, node_rank=1))
    with pytest.raises(RecipeError, match="--exclude-bad needs one launcher that reaches all hosts; here each has its"):
        ready(joined, wanted)


def test_a_launch_goes_on_without_bad_hosts(tmp_path: Path, bad: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """As many ranks as the batch allows; the recipe is resolved for their number, and the first host may go, too."""
    wanted = options(tmp_path)
    first = prepare(wanted)
    bad.extend(["a", "d"])
    with caplog.at_level(logging.WARNING):
        second = ready(first, wanted)
    assert names(second) == ["b", "c"] and second.plan.master_addr == "b" and second.plan.world_size == 2
    assert second.resolved.world_size == 2 and second.resolved.accumulation_steps == 4
    assert second.plan.launch_id == first.plan.launch_id, "the run directory is locked by this launch"
    assert "a, d cannot take part\n--exclude-bad: going on with 2 ranks on b x 1, c x 1" in caplog.text
    bad[:] = ["d"]
    assert names(ready(first, wanted)) == ["a", "b"], "3 ranks do not divide the batch"
    with pytest.raises(TooFewHostsError, match=r"3 hosts are left \(a, b, c\), fewer than --min-hosts 4"):
        ready(first, replace(wanted, min_hosts=4))
    with pytest.raises(
        TooFewHostsError, match=r"no 3 to 3 of the hosts that are left \(a, b, c\) can go on: .* 3 ranks"
    ):
        ready(first, replace(wanted, min_hosts=3))
    bad[:] = list("abcd")
    with pytest.raises(UnfitHostsError, match="a, b, c, d cannot take part"):
        ready(first, wanted)
