from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.config.load import BUILTIN_RECIPES, load, load_recipe
from pipeline.config.resolve import (
    ResolvedRecipe,
    accumulation_steps,
    installed_versions,
    project_commit,
    resolve,
    resolve_loaded,
)
from pipeline.config.source import read_document
from pipeline.errors import RecipeError
from tests.unit.pipeline.config.recipes import CONNECTOR, PRETRAINING, write

RECIPES = sorted(path.stem for path in BUILTIN_RECIPES.glob("*.yaml"))
PAIRS = [(name, size) for name in RECIPES for size in load_recipe(name).train.world_sizes]


def resolve_file(path: str | Path, world_size: int, sets: Sequence[str] = ()) -> ResolvedRecipe:
    return resolve_loaded(load(path, sets), world_size, sets)


@pytest.mark.parametrize(("name", "world_size"), PAIRS)
def test_every_shipped_recipe_resolves_where_it_says(name: str, world_size: int) -> None:
    resolved = resolve_file(name, world_size)
    train = resolved.recipe.train
    assert resolved.accumulation_steps * train.micro_batch * world_size == train.global_batch
    assert resolved.recipe.name in name
    read = ResolvedRecipe.from_yaml(resolved.to_yaml())
    assert read == resolved and read.to_yaml() == resolved.to_yaml(), "ranks and checkpoints hold the file's own bytes"


def test_the_shipped_set_is_complete() -> None:
    stages = ("continued_pretraining", "contrastive", "connector")
    expected = {f"{family}_{stage}" for family in ("demo", "demo_gloss_free", "spj") for stage in stages}
    assert expected | {f"phoenix14t_{stage}_8xh100" for stage in stages} <= set(RECIPES)


def test_round_trip(tmp_path: Path) -> None:
    text = PRETRAINING.replace("name: tiny", 'name: "1e3"\nseed: 7')
    resolved = resolve(load_recipe(write(tmp_path, text)), 2)
    assert ResolvedRecipe.from_yaml(resolved.to_yaml()) == resolved
    again = write(tmp_path, resolved.to_yaml(), "recipe.resolved.yaml")
    assert resolve_file(again, 2) == resolved
    assert load_recipe(again) == resolved.recipe


def test_a_resolved_recipe_runs_as_recorded(tmp_path: Path) -> None:
    base = tmp_path / "base.json"
    base.write_text('{"zero_optimization": {"stage": 3}}')
    path = write(tmp_path, PRETRAINING.replace("base: cpu", f"base: {base}"))
    resolved = resolve_file(path, 2)
    again = write(tmp_path, resolved.to_yaml(), "again.yaml")
    base.write_text('{"zero_optimization": {"stage": 2}}')
    assert resolve_file(again, 2) == resolved
    assert resolve_file(again, 4).ds_config["zero_optimization"]["stage"] == 2
    assert resolve_file(again, 2, ["seed=3"]).ds_config["zero_optimization"]["stage"] == 2


def test_an_edited_resolved_recipe_is_refused(tmp_path: Path) -> None:
    resolved = resolve(load_recipe(write(tmp_path, PRETRAINING)), 2)
    edited = write(tmp_path, resolved.to_yaml().replace("clip_norm: 1.0", "clip_norm: 3.0"), "edited.yaml")
    with pytest.raises(RecipeError, match=r"gradient_clipping is 1\.0 but its settings give 3\.0"):
        resolve_file(edited, 2)
    data = resolved.to_yaml().replace("  ds_config:", "  ds_configs:")
    with pytest.raises(RecipeError, match="block has no ds_config; use the recipe it was made from"):
        resolve_file(write(tmp_path, data, "edited.yaml"), 2)


def test_from_yaml_refuses_what_is_not_resolved(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"is not a resolved recipe: its `resolved` block needs world_size"):
        ResolvedRecipe.from_yaml(PRETRAINING)
    with pytest.raises(RecipeError, match=r"r\.yaml:1: is not valid YAML"):
        ResolvedRecipe.from_yaml("a: b: c", "r.yaml")
    text = resolve(load_recipe(write(tmp_path, PRETRAINING)), 1).to_yaml().replace("seed: 0", "sead: 0")
    with pytest.raises(RecipeError, match="does not fit this version of the recipe"):
        ResolvedRecipe.from_yaml(text)


def test_batch_arithmetic_is_exact_or_refused(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, CONNECTOR))
    assert [accumulation_steps(recipe, size) for size in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(RecipeError, match=r"is not a multiple of train\.micro_batch=2 x 3 ranks = 6; 6 or 12 would be"):
        accumulation_steps(recipe, 3)
    with pytest.raises(RecipeError, match="a world size must be at least 1, got 0"):
        resolve(recipe, 0)


def test_ranks_that_share_a_sequence_share_its_items(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, PRETRAINING), ["train.sequence_parallel=2", "train.world_sizes=[2, 4]"])
    train = recipe.train
    alone, paired = resolve(recipe, 2), resolve(recipe, 4)
    assert alone.accumulation_steps == train.global_batch // train.micro_batch == 2 * paired.accumulation_steps
    for resolved in (alone, paired):  # DeepSpeed counts slices
        assert resolved.ds_config["train_batch_size"] == 2 * train.global_batch


def test_versions_need_no_import() -> None:
    versions = installed_versions()
    assert versions["deepspeed"] and versions["torch"] and set(versions) >= {"transformers", "pyarrow", "numpy"}


def test_commit_of_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert project_commit(tmp_path) == "unknown"
    git("init", "-q")
    assert project_commit(tmp_path) == "unknown"  # nothing committed
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-qm", "one", "--no-verify")
    head = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("1")
    assert project_commit(tmp_path) == head
    (tmp_path / "f").write_text("2")
    assert project_commit(tmp_path) == f"{head}-dirty"


def test_resolved_yaml_is_explicit(tmp_path: Path) -> None:
    resolved = resolve(load_recipe(write(tmp_path, PRETRAINING)), 2)
    data = read_document(Path("r"), resolved.to_yaml()).data
    assert data["train"]["optimizer"]["eps"] == 1e-8 and data["resolved"]["world_size"] == 2
    assert dataclasses.replace(resolved, world_size=4) != resolved
