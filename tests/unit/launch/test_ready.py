"""Hosts that fail a check are left out if the user wants that; else nothing starts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from launch import ready as module
from launch.hostfile import Host, remaining_hosts
from launch.plan import LaunchPlan
from launch.preflight import UnfitHostsError
from launch.ready import Prepared, prepare, ready
from launch.run_options import RunOptions
from pipeline.errors import RecipeError

HOSTS = tuple(Host(name, (0, 1)) for name in "abcde")


def test_remaining_hosts() -> None:
    def problem(size: int) -> str:
        return "" if 16 % size == 0 else f"16 over {size}"

    assert [host.name for host in remaining_hosts(HOSTS, ("b",), problem)] == ["a", "c", "d", "e"]
    assert [host.name for host in remaining_hosts(HOSTS, ("a", "b"), problem)] == ["c", "d"], "3 x 2 do not divide 16"
    with pytest.raises(RecipeError, match="without a, b, c, d nothing can run: always wrong"):
        remaining_hosts(HOSTS, "abcd", lambda size: "always wrong")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="without a nothing can run: no host is left"):
        remaining_hosts(HOSTS[:1], ("a",), problem)


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
    assert "a, d cannot take part\n--exclude-bad: going on with 2 ranks on b, c" in caplog.text
    bad[:] = ["d"]
    assert names(ready(first, wanted)) == ["a", "b"], "3 ranks do not divide the batch"
    with pytest.raises(UnfitHostsError):
        ready(first, wanted, min_hosts=4)
    bad[:] = list("abcd")
    with pytest.raises(UnfitHostsError):
        ready(first, wanted)
