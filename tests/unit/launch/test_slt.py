"""The `slt` command: every verb explains itself, user errors are one paragraph, nothing heavy loads for help."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from launch.slt import app, main
from pipeline.engine.listing import age
from pipeline.engine.saving.retention import mark_best
from pipeline.errors import CheckpointError, DamagedCheckpointError
from tests.light_start import MODELS, output_of_light_start
from tests.source_tree import ROOT
from tests.unit.pipeline.engine.test_checkpoint import foreign, make
from tests.unit.pipeline.engine.test_zero_shards import write

runner = CliRunner()


def verbs(command: Any, path: str = "slt") -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, sub in command.commands.items():
            yield from verbs(sub, f"{path} {name}")
    else:
        yield path, command


VERBS = dict(verbs(typer.main.get_command(app)))


def slt(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_every_verb_is_there() -> None:
    expected = (
        "shards build, shards index, shards lint, shards stats, recipe check, recipe show, recipe diff, launch plan,"
        " launch run, train, evaluate, translate, recognise, export, ckpt list, ckpt inspect, ckpt verify,"
        " ckpt average, ckpt reshard, vocab extend, demo, demo-ablations"
    )
    assert {f"slt {verb}" for verb in expected.split(", ")} <= set(VERBS)


@pytest.mark.parametrize("path", VERBS)
def test_help_ends_with_an_example_of_the_verb(path: str) -> None:
    result = runner.invoke(app, [*path.split()[1:], "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    last = result.output.strip().splitlines()[-1].strip()
    assert last.startswith(f"Example: {path} ")
    words = shlex.split(last.removeprefix(f"Example: {path} "))
    options = {name for parameter in VERBS[path].params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if word.startswith("--") and word not in options]
    free_options = VERBS[path].context_settings.get("ignore_unknown_options", False)  # a corpus brings its own
    assert not unknown or free_options, f"the example uses {unknown}, which {path} does not have"
    assert VERBS[path].help, "and says what it does"


def test_help_starts_without_anything_heavy() -> None:
    assert "translate" in output_of_light_start("launch.slt", ["--help"], (*MODELS, "matplotlib"))


def test_the_command_shows_its_verbs() -> None:
    done = slt("--help")
    assert done.returncode == 0 and "Distributed pretraining for sign language translation" in done.stdout
    for word in ("shards", "recipe", "launch", "train", "export", "evaluate", "translate", "ckpt", "demo"):
        assert word in done.stdout


def test_a_user_error_is_one_paragraph_and_no_traceback(tmp_path: Path) -> None:
    done = slt("ckpt", "inspect", str(tmp_path / "step-000001"))
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: checkpoint {tmp_path / 'step-000001'} does not exist; `slt ckpt list RUN_DIR` shows the complete ones"
    ]
    assert done.stderr.rstrip().endswith(errors[0])


def test_errors_leave_with_their_own_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        def raising() -> None:
            raise error

        monkeypatch.setattr("launch.slt.app", raising)
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    from pipeline.errors import ClusterError, DataError, DivergedError, RecipeError

    codes = {
        RecipeError: 2,
        CheckpointError: 2,
        ClusterError: 3,
        DataError: 4,
        DivergedError: 5,
        DamagedCheckpointError: 6,
    }
    for kind, code in codes.items():
        assert fail(kind("what, where and how")) == code
        assert capsys.readouterr().err == "error: what, where and how\n"
    assert fail(KeyboardInterrupt()) == 130

    def bug() -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("launch.slt.app", bug)
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback; Python ends with 1
        main()


def test_libraries_keep_their_information_to_themselves() -> None:
    script = """
import logging
from launch import slt
def app():
    for name in ("shards.storage.store", "botocore.credentials"):
        logging.getLogger(name).info("%s tells", name)
slt.app = app
slt.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "shards.storage.store tells" in done.stderr and "botocore" not in done.stderr


def test_listing_checkpoints(tmp_path: Path) -> None:
    make(tmp_path, 20, payload=b"x" * 3_400_000)
    short = make(tmp_path, 100)
    (short / "part.bin").write_bytes(b"short")
    (make(tmp_path, 110) / "manifest.json").write_text("{")
    foreign(make(tmp_path, 115))
    make(tmp_path, 120, complete=False)
    folder = tmp_path / "checkpoints"
    for beside in (".tmp-step-000130", "damaged-step-000050"):
        (folder / beside).mkdir()
    mark_best(tmp_path, folder / "step-000020")
    result = runner.invoke(app, ["ckpt", "list", str(tmp_path)])
    assert result.exit_code == 0, result.output
    first, second, third, fourth, fifth, sixth = result.output.splitlines()
    assert re.fullmatch(rf"{folder}/step-000020  step 20  2 ranks  ZeRO-3  3\.4 MB  \d+ s old  best", first)
    assert second.endswith("old  DAMAGED part.bin: missing or of another size") and "  step 100  " in second
    assert third.startswith(f"{folder}/step-000110  DAMAGED {folder}/step-000110/manifest.json is damaged")
    assert fourth.startswith(f"{folder}/step-000115  SKIPPED checkpoint format 7, this version reads 1")
    assert fifth.startswith(f"{folder}/.tmp-step-000130  unfinished")
    assert sixth.startswith(f"{folder}/damaged-step-000050  set aside because it is damaged")
    none = runner.invoke(app, ["ckpt", "list", str(tmp_path / "empty")])
    assert (
        none.stdout == "" and none.stderr == f"{tmp_path / 'empty'} holds no checkpoint; if it should, check the path\n"
    )


@pytest.mark.parametrize(
    ("seconds", "words"), [(-3.0, "0 s"), (59.9, "59 s"), (61.0, "1 min"), (7201.0, "2 h"), (3e6, "34 days")]
)
def test_ages_are_in_the_largest_unit(seconds: float, words: str) -> None:
    assert age(seconds) == words


def test_verifying_one_or_all_checkpoints(tmp_path: Path) -> None:
    intact, damaged = make(tmp_path, 20), make(tmp_path, 30)
    other = foreign(make(tmp_path, 40))
    result = runner.invoke(app, ["ckpt", "verify", str(tmp_path)])
    assert result.exit_code == 0 and result.output.splitlines()[:2] == [
        f"{intact}  1 files, intact",
        f"{damaged}  1 files, intact",
    ]
    assert f"{other}  SKIPPED checkpoint format 7" in result.output
    (damaged / "part.bin").write_bytes(b"WEIGHTS")
    (intact / "manifest.json").write_text("{")
    result = runner.invoke(app, ["ckpt", "verify", str(tmp_path)])
    assert f"{damaged}  1 files, 1 DAMAGED" in result.output and f"{intact}  DAMAGED manifest" in result.output
    assert isinstance(result.exception, DamagedCheckpointError) and result.exception.exit_code == 6
    assert f"{damaged}/part.bin is damaged: its sha256 differs" in str(result.exception)
    assert f"{intact}/manifest.json is damaged" in str(result.exception)
    assert "a run that resumes uses the newest intact checkpoint" in str(result.exception)
    assert runner.invoke(app, ["ckpt", "verify", str(other)]).exit_code == 0
    result = runner.invoke(app, ["ckpt", "verify", str(tmp_path / "empty")])
    assert "is no complete checkpoint and holds none in" in str(result.exception)


def test_ckpt_reshard_names_the_copy(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    write(folder / "deepspeed")
    result = runner.invoke(app, ["ckpt", "reshard", str(folder), "--out", str(tmp_path / "universal")])
    assert result.output == f"{tmp_path / 'universal'}\n"
    assert (tmp_path / "universal" / "deepspeed-step-000001" / "zero" / "weight" / "fp32.pt").is_file()


def test_inspecting_a_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path, 20)
    result = runner.invoke(app, ["ckpt", "inspect", str(folder)])
    shown = json.loads(result.output)
    assert shown["manifest"]["step"] == shown["state"]["step"] == 20
    shown = json.loads(runner.invoke(app, ["ckpt", "inspect", str(tmp_path)]).output)
    assert shown["path"] == str(folder), "a run folder means its latest checkpoint"
    (folder / "part.bin").write_bytes(b"WEIGHTS")
    result = runner.invoke(app, ["ckpt", "inspect", str(folder)])
    assert isinstance(result.exception, DamagedCheckpointError) and result.exception.exit_code == 6
    assert "is damaged:\n  " in str(result.exception) and "part.bin is damaged: its sha256" in str(result.exception)
    assert "fix: restore these files from a copy, or choose another checkpoint" in str(result.exception)


def test_inspecting_a_checkpoint_of_another_format_shows_its_manifest(tmp_path: Path) -> None:
    folder = foreign(make(tmp_path, 20))
    result = runner.invoke(app, ["ckpt", "inspect", str(folder)])
    assert result.exit_code == 0 and '"format_version": 7' in result.output
    assert "is of another format version: shown, not verified" in result.output


def test_export_shows_its_progress_and_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.export import hf

    asked: list[tuple[object, ...]] = []

    def export(*arguments: Any) -> dict[str, float]:
        *options, show = arguments
        asked.append(tuple(options))
        show(3, 3, "MB, 2/2 tensors", 0)
        return {"logits": 1.5e-6}

    monkeypatch.setattr(hf, "export", export)
    arguments = ["export", str(tmp_path), "--no-verify", "--max-shard-gib", "0.5", "--lora", "keep"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert asked == [(tmp_path, tmp_path / "export", "best", False, 2**29, "keep")]
    assert result.stdout.splitlines() == [
        "logits: largest difference to the live model 1.5e-06",
        str(tmp_path / "export"),
    ]
    assert "export export: 3/3" in result.stderr and "MB, 2/2 tensors" in result.stderr
    runner.invoke(app, ["export", str(tmp_path), "--out", str(tmp_path / "x")])
    assert asked[1] == (tmp_path, tmp_path / "x", "best", True, 2**32, "merge"), "adapters are merged unless asked for"
