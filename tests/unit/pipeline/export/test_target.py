"""One writer at a time, and a folder that appears as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError
from pipeline.export.target import only_writer, publish, temporary_folder

HOLD = """
import sys; from pathlib import Path; from pipeline.export.target import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True); sys.stdin.read()
"""


def test_a_second_export_to_the_same_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "new" / "export"
    command = [sys.executable, "-c", HOLD, str(out)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None and other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        message = rf"another export to {out} is running \(process {other.pid} on .*\); wait for it, stop it, or give"
        with pytest.raises(CheckpointError, match=message), only_writer(out):
            raise AssertionError("both write")
        with only_writer(tmp_path / "new" / "other"):
            pass
    finally:
        other.kill()  # even so, it gives the folder free
        other.wait()
    with only_writer(out):
        pass
    assert not list(out.parent.iterdir())


def test_a_failed_export_gives_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(KeyError), only_writer(tmp_path / "export"):
        raise KeyError
    with only_writer(tmp_path / "export"):
        pass


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "export"
    for number in (1, 2):
        (temporary_folder(out) / "adapter").mkdir(parents=True)
        (temporary_folder(out) / "adapter" / f"file-{number}").write_text("")
        publish(temporary_folder(out), out)
        assert [path.name for path in out.rglob("file-*")] == [f"file-{number}"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_crash_between_the_two_renames_loses_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "export"
    out.mkdir()
    (out / "older").touch()
    temporary_folder(out).mkdir()
    real, renamed = os.replace, []

    def replace(source: Path, target: Path) -> None:
        renamed.append(target)
        if len(renamed) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        publish(temporary_folder(out), out)
    assert not out.exists()
    with only_writer(out):
        assert (out / "older").exists()
    publish(temporary_folder(out), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"] and not list(out.iterdir())
