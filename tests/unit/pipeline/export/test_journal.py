"""What a killed export had finished."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.engine.durable import sha256_of
from pipeline.export.journal import Journal


def interrupted(folder: Path) -> Journal:
    journal = Journal(folder, {"checkpoint": "a", "files": [1]})
    journal.begin()
    for name in ("one", "two"):
        (folder / name).write_text(name)
        journal.add(name, sha256_of(folder / name))
    (folder / "three.part").write_text("hal")
    return journal


def test_finished_files_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / "export"
    interrupted(folder)
    again = Journal(folder, {"files": [1], "checkpoint": "a"})
    assert list(again.files) == ["one", "two"] and "2 finished files of an interrupted export are kept" in caplog.text
    again.begin()
    assert {path.name for path in folder.iterdir()} == {".journal.json", "one", "two", "three.part"}
    again.close()
    again.close()
    assert not list(folder.glob(".journal*"))


def test_files_that_are_not_whole_are_written_again(tmp_path: Path) -> None:
    interrupted(tmp_path)
    (tmp_path / "one").write_text("oNe")
    (tmp_path / "two").unlink()
    assert Journal(tmp_path, {"checkpoint": "a", "files": [1]}).files == {}


@pytest.mark.parametrize("damage", [None, "{"])
def test_another_export_starts_from_the_beginning(
    tmp_path: Path, damage: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    journal = interrupted(tmp_path / "export")
    if damage is not None:
        journal.path.write_text(damage)
    other = Journal(tmp_path / "export", {"checkpoint": "b", "files": [1]})
    assert other.files == {} and (tmp_path / "export" / "one").exists(), "a refused export leaves it as it is"
    other.begin()
    assert not list((tmp_path / "export").iterdir())
    assert (".journal.json is damaged" in caplog.text) == (damage is not None)
