"""One resolved recipe for all ranks: who writes it, and what happens when a rank reads something else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import resolve as resolving
from pipeline.config.load import LoadedRecipe, load_recipe
from pipeline.config.recipe_file import RecipeFile, write_resolved
from pipeline.dist import Ranks
from pipeline.engine import recipe
from pipeline.engine.recipe import Unresolved, file_of_run, read_on_all_ranks
from pipeline.errors import ClusterError, RecipeError, SltError
from tests.unit.pipeline.config.recipes import CONNECTOR, write

ALONE, TWO = Ranks(0, 0, 1), Ranks(0, 0, 2)


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, with inputs that are there and no process group."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe.dist, "init", lambda: ALONE)
    monkeypatch.setattr(recipe.socket, "gethostname", lambda: "node-a")
    monkeypatch.setattr(recipe, "check_inputs", lambda loaded: None)


@pytest.fixture
def written(tmp_path: Path) -> RecipeFile:
    """A recipe for two ranks in its run directory."""
    return write_resolved(resolving.resolve(load_recipe(write(tmp_path, CONNECTOR)), 2), tmp_path / "run")


def says(monkeypatch: pytest.MonkeyPatch, *others: tuple[str, str] | None) -> None:
    """Further ranks with (host, what they say); None says what this rank does, on its host."""
    monkeypatch.setattr(recipe.dist, "gather_objects", lambda mine: [mine, *(other or mine for other in others)])


def place(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(recipe.dist, "ranks_from_environment", lambda: Ranks(rank, rank, world_size))


def test_without_a_launcher_rank_0_writes_while_it_guards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, inside = [], []

    @contextlib.contextmanager
    def guard(run_dir: Path) -> Iterator[None]:
        assert not (run_dir / "recipe.resolved.yaml").exists()
        inside.append(run_dir)
        yield
        inside.remove(run_dir)

    monkeypatch.setattr(resolving, "project_commit", lambda: asked.append(1) or "abc")
    given = Unresolved(str(write(tmp_path, CONNECTOR)), ("seed=3",))
    with file_of_run(given, guard) as file:
        assert inside == [Path("runs/tiny")] == [file.run_dir]
        resolved = read_on_all_ranks(file, ALONE)
    assert resolved.recipe.seed == 3 and resolved.git_commit == "abc"
    assert asked == [1] and inside == []


def test_what_stops_rank_0_stops_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(recipe.dist, "broadcast_object", lambda mine: sent.append(mine) or sent[0])
    for rank in (0, 1):
        place(monkeypatch, rank, 2)
        with pytest.raises(RecipeError, match=r"nowhere\.yaml is neither a recipe file nor a built-in recipe"):
            file_of_run(Unresolved("nowhere.yaml"), contextlib.nullcontext).__enter__()
    assert sent[1] is None, "the second rank did not look for itself"


def test_a_fault_of_ours_on_rank_0_stops_every_rank_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/data")

    monkeypatch.setattr(recipe, "load", broken)
    monkeypatch.setattr(recipe.dist, "broadcast_object", lambda mine: mine)
    place(monkeypatch, 0, 2)
    with pytest.raises(SltError, match=r"Traceback(.|\n)*PermissionError: .*Permission denied: '/data'") as error:
        file_of_run(Unresolved("any.yaml"), contextlib.nullcontext).__enter__()
    assert error.value.exit_code == 1
    place(monkeypatch, 0, 1)
    with pytest.raises(PermissionError):
        file_of_run(Unresolved("any.yaml"), contextlib.nullcontext).__enter__()


@pytest.mark.parametrize(("rank", "guarded"), [(0, True), (1, False)])
def test_the_launchers_file_is_taken_as_it_is(
    written: RecipeFile, rank: int, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, rank, 2)
    monkeypatch.setattr(resolving, "project_commit", lambda: pytest.fail("git is asked again"))
    monkeypatch.setattr(recipe, "load", lambda *_: pytest.fail("loaded again"))
    guards: list[Path] = []
    with file_of_run(written, lambda run_dir: guards.append(run_dir) or contextlib.nullcontext()) as file:
        says(monkeypatch, None)
        assert file is written and read_on_all_ranks(file, TWO).to_yaml() == written.path.read_text()
    assert guards == ([written.run_dir] if guarded else [])


def test_a_rank_that_reads_other_bytes(written: RecipeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    says(
        monkeypatch, None, ("node-b", "reads sha256 00"), ("node-b", "reads sha256 00"), ("node-c", "cannot read it: x")
    )
    with pytest.raises(ClusterError) as error:
        read_on_all_ranks(written, TWO)
    assert str(error.value).splitlines() == [
        f"{written.path} was written with sha256 {written.sha256}, but",
        "  rank 2,3 on node-b: reads sha256 00",
        "  rank 4 on node-c: cannot read it: x",
        "run_dir must be on storage that all hosts share under the same path, and no other run may use it; nothing was "
        "trained. Correct that, then start again",
    ]


def test_a_file_that_is_gone_or_changed(written: RecipeFile) -> None:
    written.path.write_text(f"{written.path.read_text()}\n")
    with pytest.raises(ClusterError, match=r"but\n  rank 0 on node-a: reads sha256 [0-9a-f]{64}\nrun_dir must"):
        read_on_all_ranks(written, ALONE)
    written.path.unlink()
    with pytest.raises(ClusterError, match="rank 0 on node-a: cannot read it: No such file or directory"):
        read_on_all_ranks(written, ALONE)


def test_another_number_of_ranks(written: RecipeFile) -> None:
    with pytest.raises(RecipeError, match="is resolved for 2 ranks, but 1 were started; start them with `slt launch"):
        read_on_all_ranks(written, ALONE)


def test_a_host_without_the_inputs(written: RecipeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(loaded: LoadedRecipe) -> None:
        raise RecipeError(f"{loaded.path}: {loaded.recipe.data.train[0].shards} does not exist")

    monkeypatch.setattr(recipe, "check_inputs", missing)
    says(monkeypatch, None)
    with pytest.raises(RecipeError) as error:
        read_on_all_ranks(written, TWO)
    assert str(error.value).splitlines() == [
        "inputs are missing; every host must see them under the same paths",
        f"  rank 0,1 on node-a: {written.path}: shards/video does not exist",
    ]
    assert read_on_all_ranks(written, Ranks(1, 1, 2)).world_size == 2, "one rank of a host looks for all"
