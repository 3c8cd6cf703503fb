"""What an experiment has to run: the steps of every arm and seed, each identified by what it will train.

Two arms share a step when recipe, settings, seed and the steps it reads from are equal. Its folder is named after that
identity, so a changed file or recipe never meets results of the old one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.load import load_recipe
from pipeline.config.source import as_value
from pipeline.errors import RecipeError
from pipeline.experiment.matrix import Arm, Matrix, StepSpec, arms, references, replaced, specs_of

_PLACES = ("run_dir", "name")
"""Settings that say where a run is kept, not what it is."""


@dataclass(frozen=True, slots=True)
class Step:
    """One training of the experiment."""

    name: str
    recipe: str
    sets: tuple[str, ...]
    """For `--set`; without run_dir."""
    folder: Path
    """Its run directory."""

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def is_exported(self) -> bool:
        """Whether it was finished (an export is complete or absent)."""
        return (self.export / "provenance.json").is_file()


@dataclass(frozen=True, slots=True)
class Trial:
    """One arm with one seed."""

    arm: Arm
    seed: int
    steps: tuple[Step, ...]

    def step(self, name: str | None) -> Step:
        """A step by name; the last one without. Raises RecipeError if this arm leaves it out."""
        if name is None:
            return self.steps[-1]
        for step in self.steps:
            if step.name == name:
                return step
        raise RecipeError(f"the arm {self.arm.name} leaves out step {name}, which a score asks for")


def plan(matrix: Matrix) -> list[Trial]:
    """Every arm with every seed, the baseline of a seed first.

    Raises:
        RecipeError: lists the arms whose recipes cannot be, or which lack a step that is scored.
    """
    trials, problems = [], []
    for seed in matrix.seeds:
        for arm in arms(matrix):
            try:
                trials.append(Trial(arm, seed, _steps(matrix, arm, seed)))
            except RecipeError as error:
                problems.append(f"{arm.name}: {error}")
        if problems:  # the same with every seed
            raise RecipeError("arms that cannot be trained:\n  " + "\n  ".join(problems))
    for trial in trials:
        for score in matrix.scores:
            trial.step(score.step)
    return trials


def _steps(matrix: Matrix, arm: Arm, seed: int) -> tuple[Step, ...]:
    exports: dict[str, str] = {}
    identities: dict[str, str] = {}
    found = []
    for spec in specs_of(matrix, arm):
        identity = _identity(spec, seed, identities)
        folder = Path(matrix.out) / "steps" / f"{spec.name}-{identity[:12]}"
        sets = tuple(_as_sets(replaced(spec.set, exports), seed))
        step = Step(spec.name, spec.recipe, sets, folder)
        found.append(step)
        exports[spec.name], identities[spec.name] = str(step.export), identity
    if not found:
        raise RecipeError("it leaves out every step")
    return tuple(found)


def _identity(spec: StepSpec, seed: int, earlier: dict[str, str]) -> str:
    """sha256 of all that decides what a step trains, in hexadecimal.

    The recipe is part of it as it is read, with what it reads from other steps named by their identity.
    """
    names = {name: f"/{name}-{earlier[name]}" for name in references(spec.set)}
    recipe = load_recipe(spec.recipe, list(_as_sets(replaced(spec.set, names), seed))).model_dump(mode="json")
    content = {key: value for key, value in recipe.items() if key not in _PLACES}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_sets(settings: dict[str, Any], seed: int) -> list[str]:
    values = {**settings, "seed": seed}
    return [f"{name}={_text(value)}" for name, value in values.items()]


def _text(value: Any) -> str:
    return as_value(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
