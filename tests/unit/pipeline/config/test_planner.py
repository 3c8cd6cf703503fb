from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import planner, resolve
from pipeline.config.load import load_recipe
from pipeline.config.planner import Answer, NotPlanned, ask, too_large
from pipeline.errors import RecipeError
from tests.unit.pipeline.config.recipes import CONTRASTIVE, PRETRAINING, write

GIB = 1024**3
LINES = [
    {"item": "activations of the LLM", "bytes": 30 * GIB, "phases": ["backward"]},
    {"item": "AdamW moments", "bytes": 20 * GIB, "phases": ["backward", "optimizer step"]},
    {"item": "gradients of the step", "bytes": 40 * GIB, "phases": ["optimizer step"]},
]
PLAN = {"lines": LINES, "phase": "backward", "peak_bytes": 50 * GIB, "gpu_gib": 40}
TOO_LARGE = Answer("zero3_offload", "zero1 would need 50.0 GiB of 40 GiB", PLAN, False, ("train.micro_batch=1",))


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No answer of another test, and models that are there."""
    planner._asked.cache_clear()
    resolve._warn_once.cache_clear()
    monkeypatch.setattr(planner, "missing_part", lambda recipe: "")
    yield
    planner._asked.cache_clear()


def test_what_does_not_fit_is_named_with_what_would() -> None:
    assert too_large(TOO_LARGE, 8) == (
        "a rank of 8 does not fit into its GPU: zero1 would need 50.0 GiB of 40 GiB, most in backward: activations of"
        " the LLM 30.0 GiB, AdamW moments 20.0 GiB. The nearest recipes that do:\n  train.micro_batch=1"
    )
    nothing = too_large(Answer("zero3", "", PLAN, False), 8)
    assert nothing.endswith("GiB. No change of up to three settings makes it fit; use a smaller model, or more memory")


def test_a_planner_that_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write(tmp_path, PRETRAINING))
    monkeypatch.setattr(planner, "_PROGRAM", "raise ModuleNotFoundError('No module named torch')")
    with pytest.raises(NotPlanned, match="cannot run here: ModuleNotFoundError: No module named torch"):
        ask(recipe, 2)
    monkeypatch.setattr(planner, "_PROGRAM", 'print(\'{"problem": "no config"}\')')
    with pytest.raises(NotPlanned, match="no config"):
        ask(recipe, 2)

    def hang(*args: Any, **kwargs: Any) -> None:
        raise subprocess.TimeoutExpired("python", 600)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(NotPlanned, match="did not answer within 600 s"):
        ask(recipe, 2)


def test_a_missing_model_needs_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(planner, "_PROGRAM", "raise SystemError('was started')")
    with pytest.raises(NotPlanned, match=r"model\.llm\.tokenizer=models/tokenizer"):
        ask(load_recipe(write(tmp_path, PRETRAINING)), 2)


def test_a_planned_recipe_is_asked_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program gets the recipe and the world size as JSON."""
    recipe = load_recipe(write(tmp_path, PRETRAINING))
    program = (
        "import json, sys; q = json.load(sys.stdin); open(q['recipe']['run_dir'], 'a').write('asked '); "
        "print(json.dumps(dict(base='zero1', reason=str(q['world_size']), plan={}, fits=True, fixes=[])))"
    )
    monkeypatch.setattr(planner, "_PROGRAM", program)
    recipe = recipe.model_copy(update={"run_dir": str(tmp_path / "asked")})
    assert ask(recipe, 2) == ask(recipe, 2) == Answer("zero1", "2", {}, True)
    assert (tmp_path / "asked").read_text() == "asked "


def _auto(folder: Path, *sets: str) -> Any:
    return load_recipe(write(folder, PRETRAINING), ["deepspeed.base=auto", "deepspeed.gpu_memory_gib=40", *sets])


def test_auto_takes_the_planners_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The choice is in the resolved recipe and in the log; the recipe keeps `auto`."""
    caplog.set_level("INFO")
    monkeypatch.setattr(resolve, "ask", lambda recipe, world_size: Answer("zero1", "zero1: 3.0 GiB", {}, True))
    resolved = resolve.resolve(_auto(tmp_path), 2)
    assert resolved.ds_config["zero_optimization"]["stage"] == 1 and resolved.recipe.deepspeed.base == "auto"
    assert "deepspeed.base=auto: zero1: 3.0 GiB" in caplog.messages
    assert "zero_choice: 'zero1: 3.0 GiB'" in resolved.to_yaml()
    assert resolve.ResolvedRecipe.from_yaml(resolved.to_yaml()) == resolved


def test_auto_without_a_plan_is_zero3_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def cannot(recipe: Any, world_size: int) -> Answer:
        raise NotPlanned("no config of models/llm")

    monkeypatch.setattr(resolve, "ask", cannot)
    resolved = resolve.resolve(_auto(tmp_path), 2)
    assert resolved.ds_config["zero_optimization"]["stage"] == 3
    resolve.resolve(_auto(tmp_path), 1)
    assert caplog.text.count("zero3 for now, the least cannot be found: no config of models/llm") == 1
    section = ["deepspeed.base=auto", "deepspeed.gpu_memory_gib=40", "model.visual.backbone.frames_per_pass=8"]
    passes = resolve.resolve(load_recipe(write(tmp_path, CONTRASTIVE), section), 2)
    assert passes.ds_config["zero_optimization"]["stage"] == 2, "stage 3 takes no passes"


def test_auto_takes_the_planners_share_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks read a number: the resolved recipe keeps no `auto` here."""
    answer = Answer("cpu", "cpu, 0.25 of the layers recomputed: 3.0 GiB", {}, True, recompute=0.25)
    monkeypatch.setattr(resolve, "ask", lambda recipe, world_size: answer)
    sets = ["model.gradient_checkpointing=auto", "deepspeed.gpu_memory_gib=40"]
    recipe = load_recipe(write(tmp_path, PRETRAINING), sets)
    resolved = resolve.resolve(recipe, 2)
    assert resolved.recipe.model.gradient_checkpointing == 0.25 and resolved.zero_choice == answer.reason
    assert resolve.ResolvedRecipe.from_yaml(resolved.to_yaml()) == resolved

    def cannot(recipe: Any, world_size: int) -> Answer:
        raise NotPlanned("no config of models/llm")

    monkeypatch.setattr(resolve, "ask", cannot)
    unplanned = resolve.resolve(recipe, 2)
    assert unplanned.recipe.model.gradient_checkpointing is True
    assert unplanned.zero_choice == "every layer recomputed: no config of models/llm"
    with pytest.raises(RecipeError, match=r"model\.gradient_checkpointing=auto needs deepspeed\.gpu_memory_gib"):
        load_recipe(write(tmp_path, PRETRAINING), sets[:1])
    with pytest.raises(RecipeError, match=r"offload_activations moves what model\.gradient_checkpointing keeps"):
        load_recipe(write(tmp_path, PRETRAINING), [*sets, "continued_pretraining.offload_activations=true"])


def test_auto_refuses_what_fits_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "ask", lambda recipe, world_size: TOO_LARGE)
    with pytest.raises(RecipeError, match="a rank of 2 does not fit into its GPU"):
        resolve.resolve(_auto(tmp_path), 2)


def test_auto_needs_a_size_and_leaves_the_stage_alone(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"auto needs deepspeed\.gpu_memory_gib, the memory of one GPU"):
        load_recipe(write(tmp_path, PRETRAINING), ["deepspeed.base=auto"])
    with pytest.raises(RecipeError, match="auto chooses the ZeRO stage, but deepspeed"):
        _auto(tmp_path, "deepspeed.overrides={zero_optimization: {stage: 2}}")
