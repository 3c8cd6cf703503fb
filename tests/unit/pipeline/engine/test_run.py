"""How one rank ends: what it prints, what it leaves for the launcher."""

from __future__ import annotations

import json
import logging
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.config.load import LoadedRecipe
from pipeline.config.recipe_file import RecipeFile
from pipeline.dist import Ranks
from pipeline.engine import recipe as recipe_of_run
from pipeline.engine import run
from pipeline.engine.recipe import Unresolved
from pipeline.engine.signals import StopFlag
from pipeline.errors import RecipeError
from tests.unit.pipeline.config.recipes import CONNECTOR, write

STARTED = (StopFlag(), run.Launcher(lambda note: False, nullcontext))


class Left(BaseException):
    """Instead of the end of the test's own process."""


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A rank whose peers agree, of a run whose inputs are there."""
    monkeypatch.setattr(logging.root, "handlers", [])
    logging.getLogger("pipeline").setLevel(logging.INFO)  # as the command does
    monkeypatch.chdir(tmp_path)
    for module in (run, recipe_of_run):
        monkeypatch.setattr(module.dist, "init", lambda: Ranks(0, 0, 1))
    monkeypatch.setattr(run.dist, "shutdown", lambda: None)
    monkeypatch.setattr(recipe_of_run, "check_inputs", lambda loaded: None)

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(run.os, "_exit", leave)
    return write(tmp_path, CONNECTOR)


def end(
    recipe: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, listens: bool = False
) -> tuple[int, dict[str, object]]:
    """Exit code and note of a rank whose training raises."""

    def fail(*_: object) -> tuple[int, str]:
        raise error

    with monkeypatch.context() as patch, pytest.raises(Left) as left:
        patch.setattr(run, "train", fail)
        run.main(Unresolved(str(recipe)), StopFlag(), run.Launcher(lambda note: listens, nullcontext))
    return left.value.args[0], json.loads((recipe.parent / "runs/tiny/logs/exit-rank-0.json").read_text())


def test_an_error_is_told_by_the_rank_or_by_its_launcher(
    rank: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note = {"rank": 0, "code": 2, "error": "no such split", "stopped": ""}
    code, left = end(rank, RecipeError("no such split"), monkeypatch)
    assert (code, left) == (2, {**note, "step": 0, "host": socket.gethostname(), "time": left["time"]})
    assert capsys.readouterr().err == "error (rank 0): no such split\n"
    assert end(rank, RecipeError("no such split"), monkeypatch, listens=True)[0] == 2
    assert capsys.readouterr().err == ""
    assert end(rank, ValueError("ours"), monkeypatch, listens=True)[0] == 1
    assert "Traceback" in capsys.readouterr().err, "the launcher shows its last line only"


def test_a_lost_peer_ends_a_rank_as_a_consequence(
    rank: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logged: list[tuple[object, ...]] = []
    monkeypatch.setattr(run.logger, "info", lambda *given, exc_info: logged.append((*given, exc_info)))
    code, note = end(rank, RuntimeError("[pair.cc:534] Connection closed by peer [10.77.0.2]:4391"), monkeypatch)
    assert code == note["code"] == 3 and note["consequence"] is True
    assert "another rank could not be reached: [pair.cc:534] Connection closed by peer" in capsys.readouterr().err
    ((_, told, error),) = logged
    assert told == 3 and isinstance(error, RuntimeError), "the traceback is in the rank's log"
    code, note = end(rank, RuntimeError("CUDA error: unspecified launch failure"), monkeypatch)
    assert code == 3 and "consequence" not in note and str(note["error"]).startswith("the GPU or its driver failed")


def test_a_launchers_file_that_is_gone_is_noted_beside_it(
    rank: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(Left, match="3"):
        run.main(RecipeFile(Path("runs/tiny/recipe.resolved.yaml"), "0" * 64), *STARTED)
    note = json.loads(Path("runs/tiny/logs/exit-rank-0.json").read_text())
    assert note["code"] == 3 and "cannot read it: No such file or directory" in note["error"]
    assert capsys.readouterr().err == f"error (rank 0): {note['error']}\n"


def test_a_recipe_that_cannot_be_read_is_told_and_leaves_nothing(
    rank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Left, match="2"):
        run.main(Unresolved("nowhere.yaml"), *STARTED)
    assert capsys.readouterr().err.startswith("error (rank 0): nowhere.yaml is neither a recipe file")
    assert not Path("runs").exists()


def test_a_rank_without_all_of_its_variables(
    rank: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Left, match="3"):
        run.main(Unresolved(str(rank)), *STARTED)
    assert capsys.readouterr().err.startswith(
        "error (rank 0): the environment sets WORLD_SIZE but not RANK, LOCAL_RANK"
    )


def test_inputs_are_looked_at_before_anything_is_built(
    rank: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(loaded: LoadedRecipe) -> None:
        raise RecipeError(f"{loaded.recipe.data.train[0].shards} does not exist")

    monkeypatch.setattr(recipe_of_run, "check_inputs", missing)
    monkeypatch.setattr(run, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(Left, match="2"):
        run.main(Unresolved(str(rank)), *STARTED)
    assert capsys.readouterr().err == "error (rank 0): shards/video does not exist\n"


@pytest.mark.parametrize(("number", "told"), [("0", True), ("1", False)])
def test_remarks_on_a_recipe_are_told_once(
    rank: Path, number: str, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Unresolved(str(rank), ("data.block_tokens=7",))
    others = recipe_of_run._resolve(given, 2, lambda run_dir: None)
    for name, value in {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(run.dist, "broadcast_object", lambda mine: mine or others)
    monkeypatch.setattr(run, "read_on_all_ranks", lambda file, ranks: None)
    monkeypatch.setattr(run, "train", lambda *_: (0, ""))
    capsys.readouterr()
    assert run.main(given, *STARTED) == 0
    assert ("data.block_tokens (--set data.block_tokens=7) is not read" in capsys.readouterr().err) is told
