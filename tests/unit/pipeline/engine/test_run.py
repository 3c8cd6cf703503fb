"""How one rank ends: what it prints, what it leaves for the launcher."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.config.load import LoadedRecipe
from pipeline.engine import run
from pipeline.engine.signals import StopFlag
from pipeline.errors import RecipeError
from tests.unit.pipeline.config.recipes import CONNECTOR, write

PLACE = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
STARTED = (StopFlag(), run.Launcher(lambda note: None, nullcontext))


class Left(BaseException):
    """Instead of the end of the test's own process."""


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The second of two ranks of a run whose inputs are there."""
    monkeypatch.setattr(logging.root, "handlers", [])
    logging.getLogger("pipeline").setLevel(logging.INFO)  # as the command does
    monkeypatch.chdir(tmp_path)
    for name, value in {**PLACE, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLT_LAUNCH_ID", raising=False)
    monkeypatch.setattr(run, "check_inputs", lambda loaded: None)

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(run.os, "_exit", leave)
    return write(tmp_path, CONNECTOR)


def end(recipe: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, object]]:
    """Exit code and note of a rank whose training raises."""

    def fail(*_: object) -> tuple[int, str]:
        raise error

    monkeypatch.setattr(run, "train", fail)
    with pytest.raises(Left) as left:
        run.main(str(recipe), [], *STARTED)
    return left.value.args[0], json.loads((recipe.parent / "runs/tiny/logs/exit-rank-1.json").read_text())


def test_an_error_is_told_by_the_rank_or_by_its_launcher(
    rank: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note = {"rank": 1, "code": 2, "error": "no such split", "stopped": ""}
    assert end(rank, RecipeError("no such split"), monkeypatch) == (2, note)
    assert capsys.readouterr().err == "error (rank 1): no such split\n"
    monkeypatch.setenv("SLT_LAUNCH_ID", "x")
    assert end(rank, RecipeError("no such split"), monkeypatch) == (2, note)
    assert capsys.readouterr().err == ""
    assert end(rank, ValueError("ours"), monkeypatch)[0] == 1
    assert "Traceback" in capsys.readouterr().err, "the launcher shows its last line only"


def test_a_recipe_that_cannot_be_read_is_told_by_every_rank(
    rank: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLT_LAUNCH_ID", "x")
    with pytest.raises(Left, match="2"):
        run.main("nowhere.yaml", [], *STARTED)
    assert capsys.readouterr().err.startswith("error (rank 1): nowhere.yaml is neither a recipe file")


def test_inputs_are_looked_at_before_anything_is_built(rank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(loaded: LoadedRecipe) -> None:
        raise RecipeError(f"{loaded.recipe.data.train[0].shards} does not exist")

    monkeypatch.setattr(run, "check_inputs", missing)
    code, note = end(rank, AssertionError("trained"), monkeypatch)
    assert (code, note["error"]) == (2, "shards/video does not exist")


@pytest.mark.parametrize(("number", "launched", "told"), [("0", False, True), ("1", False, False), ("0", True, False)])
def test_remarks_on_a_recipe_are_told_once(
    rank: Path,
    number: str,
    launched: bool,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", number)
    if launched:
        monkeypatch.setenv("SLT_LAUNCH_ID", "x")
    monkeypatch.setattr(run, "train", lambda *_: (0, ""))
    monkeypatch.setattr(run.dist, "shutdown", lambda: None)
    assert run.main(str(rank), ["data.block_tokens=7"], *STARTED) == 0
    assert ("data.block_tokens (--set data.block_tokens=7) is not read" in capsys.readouterr().err) is told
