from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from launch import joined
from launch.joined import follow, lead
from launch.lock import hold
from launch.status import Journal
from pipeline.config.load import load_recipe
from pipeline.config.resolve import ResolvedRecipe, resolve
from pipeline.errors import ClusterError, RecipeError, StorageError


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> ResolvedRecipe:
    monkeypatch.setattr(joined, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(joined, "_SETTLE_SECONDS", 0.2)
    return resolve(load_recipe("demo_connector"), 2)


def test_the_others_wait_for_the_first(mine: ResolvedRecipe, tmp_path: Path) -> None:
    other = threading.Thread(target=follow, args=(mine, tmp_path, 20.0))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "exit-rank-0.json").write_text("of an earlier launch")
    (tmp_path / joined.RESOLVED_RECIPE).write_text(mine.to_yaml())  # of an earlier launch, too: nobody leads yet
    other.start()
    other.join(timeout=0.2)
    assert other.is_alive()
    with hold(tmp_path, "id"):
        lead(mine, tmp_path)
        other.join(timeout=10)
    assert not other.is_alive() and not list((tmp_path / "logs").iterdir())


def test_a_host_that_resolves_something_else(mine: ResolvedRecipe, tmp_path: Path) -> None:
    theirs = dataclasses.replace(mine, git_commit="abc", versions={**mine.versions, "torch": "9.9"})
    with hold(tmp_path, "id"):
        with pytest.raises(ClusterError, match="is not there; run_dir must be on storage that all hosts share"):
            follow(mine, tmp_path, 5.0)
        lead(theirs, tmp_path)
        with pytest.raises(ClusterError) as error:
            follow(mine, tmp_path, 5.0)
    text = str(error.value)
    assert "which the first host wrote, differs from what this host resolves:" in text and "nothing was started" in text
    assert "\n  resolved.git_commit: 'abc' there, " in text and "\n  resolved.versions.torch: '9.9' there, " in text
    many = dataclasses.replace(mine, versions={f"package-{number}": "1" for number in range(20)})
    assert "more\nevery host needs the same command, code and packages" in joined._difference(
        many.to_yaml(), mine.to_yaml()
    )


def test_a_first_host_that_never_starts(mine: ResolvedRecipe, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"no launch holds .* after 0 s: start the first host \(--node-rank 0\)"):
        follow(mine, tmp_path, 0.1)


def test_a_launch_that_trains_already_is_another_one(mine: ResolvedRecipe, tmp_path: Path) -> None:
    """Its recipe may be the same: somebody has started the command a second time."""
    with hold(tmp_path, "id"):
        lead(mine, tmp_path)
        journal = Journal(tmp_path, "earlier")
        journal.set(total_steps=9)
        journal.write()
        follow(mine, tmp_path, 5.0)
        journal.set(launch_id="id")
        journal.write()
        with pytest.raises(RecipeError, match="is in use by launch id, which trains already, without this host"):
            follow(mine, tmp_path, 5.0)


def test_a_note_that_cannot_be_removed(mine: ResolvedRecipe, tmp_path: Path) -> None:
    (tmp_path / "logs" / "exit-rank-0.json").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"exit-rank-0.json could not be removed: .*; nothing was started"):
        lead(mine, tmp_path)
