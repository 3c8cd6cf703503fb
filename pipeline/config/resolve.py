"""A recipe for one world size, fully explicit: exact batch arithmetic, DeepSpeed configuration, versions, commit.

`ResolvedRecipe.to_yaml` writes an ordinary recipe plus a ``resolved`` block; reading it back gives the same object,
and running it at the same world size uses the recorded DeepSpeed configuration unchanged.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config.checks import auto_settings, batch_problem
from pipeline.config.deepspeed import ds_config, owned_values
from pipeline.config.load import PROJECT_ROOT, RESOLVED_BLOCK, LoadedRecipe
from pipeline.config.planner import NotPlanned, ask, too_large
from pipeline.config.schema import AUTO, Recipe
from pipeline.config.source import dump_yaml, read_document
from pipeline.errors import RecipeError

log = logging.getLogger(__name__)

_PACKAGES = (
    "llava-slt", "torch", "deepspeed", "transformers", "accelerate", "tokenizers", "safetensors", "peft", "webdataset",
    "av", "pyarrow", "numpy", "pydantic",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ResolvedRecipe:
    """Everything that decides a run, and what it ran with."""

    recipe: Recipe
    world_size: int
    accumulation_steps: int
    """Micro-batches per rank and optimizer step: global_batch x sequence_parallel / (micro_batch x world_size), always
    exact."""
    ds_config: dict[str, Any]
    """Passed to DeepSpeed as it is; holds no "auto"."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package -> version, or ``not installed``."""
    git_commit: str = "unknown"
    """Commit of the project's checkout, with ``-dirty`` when tracked files differ; ``unknown`` outside a checkout."""
    zero_choice: str = ""
    """Where `deepspeed.base` or `model.gradient_checkpointing` was `auto`: what was chosen and why."""

    def to_dict(self) -> dict[str, Any]:
        """The recipe's settings at the top, the rest under ``resolved``."""
        block = {
            "world_size": self.world_size,
            "accumulation_steps": self.accumulation_steps,
            "git_commit": self.git_commit,
            "versions": self.versions,
            "ds_config": self.ds_config,
            **({"zero_choice": self.zero_choice} if self.zero_choice else {}),
        }
        return {**self.recipe.model_dump(mode="json"), RESOLVED_BLOCK: block}

    def to_yaml(self) -> str:
        return dump_yaml(self.to_dict())

    @classmethod
    def from_yaml(cls, text: str, label: str = "resolved recipe") -> ResolvedRecipe:
        """The inverse of `to_yaml`. Raises RecipeError when the text is not a complete resolved recipe."""
        document = read_document(Path(label), text)
        block = document.data.pop(RESOLVED_BLOCK, None)
        keys = ("world_size", "accumulation_steps", "ds_config", "versions", "git_commit")
        if document.problems:
            first = document.problems[0]
            raise RecipeError(f"{first.where or label}: {first.text}")
        if not isinstance(block, dict) or not all(key in block for key in keys):
            raise RecipeError(
                f"{label} is not a resolved recipe: its `{RESOLVED_BLOCK}` block needs {', '.join(keys)};"
                " a run writes one to <run_dir>/recipe.resolved.yaml"
            )
        try:
            recipe = Recipe.model_validate_json(json.dumps(document.data), strict=True)
        except ValidationError as error:
            raise RecipeError(f"{label} does not fit this version of the recipe: {error}") from error
        return cls(recipe=recipe, zero_choice=block.get("zero_choice", ""), **{key: block[key] for key in keys})


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Micro-batches per rank and optimizer step. Raises RecipeError unless the global batch divides exactly."""
    problem = batch_problem(recipe, world_size)
    if problem:
        raise RecipeError(problem)
    groups = world_size // recipe.train.sequence_parallel
    return recipe.train.global_batch // (recipe.train.micro_batch * groups)


def resolve(recipe: Recipe, world_size: int) -> ResolvedRecipe:
    """Make a recipe explicit for ``world_size`` ranks. Needs no GPU, no network and no torch.

    Raises:
        RecipeError: the batch does not divide, or the DeepSpeed configuration cannot be used.
    """
    steps = accumulation_steps(recipe, world_size)
    recipe, base, reason = memory_choice(recipe, world_size)
    chosen = with_settings(recipe, {"deepspeed.base": base})
    return ResolvedRecipe(
        recipe=recipe,
        world_size=world_size,
        accumulation_steps=steps,
        ds_config=ds_config(chosen, world_size, steps),
        versions=installed_versions(),
        git_commit=project_commit(),
        zero_choice=reason,
    )


def memory_choice(recipe: Recipe, world_size: int) -> tuple[Recipe, str, str]:
    """The recipe with its share of recomputed layers, the DeepSpeed base of the run and, where either is `auto`, why it
    was chosen.

    Raises:
        RecipeError: nothing fits into `deepspeed.gpu_memory_gib`.
    """
    left = auto_settings(recipe)
    if not left:
        return recipe, recipe.deepspeed.base, ""
    try:
        answer = ask(recipe, world_size)
    except NotPlanned as problem:
        base = _unplanned_base(recipe) if recipe.deepspeed.base == AUTO else recipe.deepspeed.base
        most = {"deepspeed.base": base, "model.gradient_checkpointing": "every layer recomputed"}
        chosen = ", ".join(most[name] for name in left)
        _warn_once(f"{' and '.join(left)}=auto: {chosen} for now, the least cannot be found: {problem}")
        return with_recomputed(recipe, True), base, f"{chosen}: {problem}"
    if not answer.fits:
        raise RecipeError(too_large(answer, world_size))
    log.info("%s=auto: %s", " and ".join(left), answer.reason)
    return with_recomputed(recipe, answer.recompute), answer.base, answer.reason


def _unplanned_base(recipe: Recipe) -> str:
    """The base that needs the least memory and that the recipe can run under: stage 3 takes no passes over frames."""
    visual = recipe.model.visual
    passes = visual is not None and visual.backbone is not None and visual.backbone.frames_per_pass
    return "zero2" if passes else "zero3"


@functools.cache
def _warn_once(text: str) -> None:
    """A recipe may be resolved for several world sizes; the reason is the same for all."""
    log.warning(text)


def with_recomputed(recipe: Recipe, share: bool | float) -> Recipe:
    """The recipe with this share of recomputed layers where it says `auto`."""
    if recipe.model.gradient_checkpointing != AUTO:
        return recipe
    return with_settings(recipe, {"model.gradient_checkpointing": share})


def with_settings(recipe: Recipe, change: Mapping[str, Any]) -> Recipe:
    """The recipe with other values of dotted settings, which nobody checks again."""
    for name, value in change.items():
        recipe = _replaced(recipe, name.split("."), value)
    return recipe


def _replaced(section: Any, keys: list[str], value: Any) -> Any:
    if len(keys) > 1:
        value = _replaced(getattr(section, keys[0]), keys[1:], value)
    return section.model_copy(update={keys[0]: value})


def resolve_loaded(loaded: LoadedRecipe, world_size: int, sets: Sequence[str] = ()) -> ResolvedRecipe:
    """Resolve a recipe loaded with these ``sets``. A resolved one at its own world size keeps its recorded DeepSpeed
    configuration.

    Raises:
        RecipeError: as `resolve`, or a resolved recipe contradicts its own record.
    """
    path = loaded.path
    resolved = resolve(loaded.recipe, world_size)
    record = loaded.recorded
    if record is None or sets or record.get("world_size") != world_size:
        return resolved
    recorded = record.get("ds_config")
    if not isinstance(recorded, dict):
        raise RecipeError(f"{path}: the {RESOLVED_BLOCK} block has no ds_config; use the recipe it was made from")
    for key, value in owned_values(resolved.recipe, world_size, resolved.accumulation_steps).items():
        if recorded.get(key) != value:
            raise RecipeError(
                f"{path}: {RESOLVED_BLOCK}.ds_config.{key} is {recorded.get(key)!r} but its settings give {value!r};"
                " a resolved recipe is not meant to be edited, change the original or use --set"
            )
    if recorded != resolved.ds_config:
        log.warning("%s: using its recorded DeepSpeed configuration, which differs from today's base", path)
    return replace(resolved, ds_config=recorded)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide results, without importing them."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def project_commit(root: Path = PROJECT_ROOT) -> str:
    """Commit of the checkout this code runs from, with ``-dirty`` if tracked files were changed."""
    if not (root / ".git").exists():  # installed as a package: an outer repository is not ours
        return "unknown"
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("no commit recorded: %s", error)
        return "unknown"
    return f"{commit}-dirty" if dirty else commit


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    return done.stdout.strip()


__all__ = [
    "ResolvedRecipe", "accumulation_steps", "installed_versions", "project_commit", "resolve", "resolve_loaded",
]  # fmt: skip
