"""One run per run directory, on one host and on many."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import lock
from launch.lock import Holder, hold
from pipeline.errors import RecipeError, StorageError

RAN_BEFORE = "4026531836"


def written(run_dir: Path, **changes: object) -> Holder:
    """A lock as this process would write it, with some fields changed."""
    holder = dataclasses.replace(lock._myself("old-launch"), **changes)  # type: ignore[arg-type]
    (run_dir / "launch.lock").write_text(holder.key)
    return holder


def age(run_dir: Path, seconds: float) -> None:
    path = run_dir / "launch.lock"
    now = path.stat().st_mtime
    os.utime(path, (now - seconds, now - seconds))


def test_the_second_is_refused_by_name_and_the_third_may(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    with hold(run_dir, "a"):
        holder = lock._read(run_dir / "launch.lock")
        assert holder is not None and holder.pid == os.getpid()
        with (
            pytest.raises(RecipeError, match="two runs would overwrite each other's checkpoints") as error,
            hold(run_dir, "b"),
        ):
            pytest.fail("two hold it")
        for part in (holder.host, f"process {os.getpid()}", holder.started, "launch a"):
            assert part in str(error.value)
    assert list(run_dir.iterdir()) == []
    with hold(run_dir, "b"):
        pass


def test_a_dead_holders_lock_is_taken_over_after_its_orphans(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    start = lock._process_start(dead.pid)
    dead.wait()
    written(tmp_path, pid=dead.pid, process_start=start)
    orphans: list[str] = []
    with hold(tmp_path, "new", orphans.append):
        holder = lock._read(tmp_path / "launch.lock")
        assert holder is not None and holder.launch_id == "new" and orphans == ["old-launch"]


def test_a_zombie_holds_nothing(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    written(tmp_path, pid=dead.pid, process_start=lock._process_start(dead.pid))
    with pytest.raises(RecipeError, match="is in use by"), hold(tmp_path, "new"):
        pass
    dead.kill()
    while lock._process_start(dead.pid):
        pass
    with hold(tmp_path, "new"):
        pass
    dead.communicate()


def test_a_pid_that_was_used_again_is_another_process(tmp_path: Path) -> None:
    written(tmp_path, process_start="1")
    with hold(tmp_path, "new"):
        holder = lock._read(tmp_path / "launch.lock")
        assert holder is not None and holder.launch_id == "new"


@pytest.mark.parametrize("pid", [os.getpid, lambda: 2**22 - 1], ids=["same_pid", "free_pid"])
def test_another_host_is_believed_as_long_as_it_gives_signs_of_life(tmp_path: Path, pid: object) -> None:
    """Its pid means nothing here, whether or not a process has it."""
    written(tmp_path, host="gpu7", system="another boot", pid=pid(), process_start="1")  # type: ignore[operator]
    age(tmp_path, 100)
    message = r"in use by process \d+ on gpu7, started .* which was last seen alive 100 s ago.* start again in 20 s"
    with pytest.raises(RecipeError, match=message), hold(tmp_path, "new"):
        pass
    age(tmp_path, 21)
    with hold(tmp_path, "new"):
        pass


def test_the_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with hold(tmp_path, "a"):
        age(tmp_path, 100)
        seconds, end = 100.0, time.monotonic() + 30
        while seconds > 50 and time.monotonic() < end:
            time.sleep(0.01)
            seconds = lock._age_seconds(tmp_path / "launch.lock") or seconds
        assert seconds < 50, "still as old as before"


def test_a_lock_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "launch.lock").write_text("{")
    age(tmp_path, 10)
    with (
        pytest.raises(RecipeError, match=r"launch\.lock cannot be read; if no run uses this directory, remove it"),
        hold(tmp_path, "a"),
    ):
        pass
    age(tmp_path, 111)
    with hold(tmp_path, "a"):
        pass


def test_two_that_take_over_at_once_do_not_both_hold(tmp_path: Path) -> None:
    """The other one was quicker: what lies there now is not what was judged."""
    written(tmp_path, process_start="1")

    def quicker(launch_id: str) -> None:
        written(tmp_path, launch_id="quicker")

    with pytest.raises(RecipeError, match="launch quicker"), hold(tmp_path, "slower", quicker):
        pass
    assert json.loads((tmp_path / "launch.lock").read_text())["launch_id"] == "quicker"
    assert [path.name for path in tmp_path.iterdir()] == ["launch.lock"]


def test_a_lock_that_was_taken_over_is_not_removed_by_its_first_holder(tmp_path: Path) -> None:
    with hold(tmp_path, "a"):
        written(tmp_path)
    assert (tmp_path / "launch.lock").exists()


def test_a_full_disk_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock.os, "fdopen", full)
    with (
        pytest.raises(
            StorageError, match=r"cannot be locked: .*launch\.lock could not be written: No space left"
        ) as error,
        hold(tmp_path, "a"),
    ):
        pass
    assert error.value.exit_code == 2 and list(tmp_path.iterdir()) == []
