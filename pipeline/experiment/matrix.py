"""The file of an experiment: steps that every arm runs, axes that change them, seeds, and what is scored."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from pipeline.config.section import Section
from pipeline.config.source import read_document
from pipeline.errors import RecipeError

Settings = dict[str, Any]
"""Dotted setting of a recipe -> value. ``{step}`` in a text stands for the folder that this step exports, except in
prompts, whose fields are written alike."""
_PROMPTS = ("connector", "connector.prompt", "connector.prompts")
_REFERENCE = re.compile(r"\{([a-z0-9_]+)\}")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


class StepSpec(Section):
    """One training; its export is what later steps and scores use."""

    name: str
    """Lower-case letters, digits and underscores."""
    recipe: str
    """File, or name of a built-in recipe."""
    set: Settings = {}
    """Changes to it."""


class ScoreSpec(Section):
    """What an arm is compared by: a split that its model translates, or a held-out metric of a step's training."""

    name: str
    """Column of the table."""
    step: str | None = None
    """Whose export or metrics; default the last one."""
    shards: str | None = None
    """Shard set that the model translates."""
    split: str = "test"
    """Of the shard set."""
    protocol: str = "default"
    """Scoring protocol."""
    metric: str | None = None
    """Instead of shards: a held-out metric (`eval/video_to_text/r1`); its value at the exported checkpoint."""
    pose: list[str] = []
    """Keypoints beside the shards, for a model that reads both."""
    options: Settings = {}
    """Of `slt evaluate --set`."""


class ComputeSpec(Section):
    """Arms are to be compared at equal compute."""

    measure: Literal["seconds", "samples", "steps"] = "seconds"
    """Of training, over all steps of an arm: seconds inside steps, samples read, or optimizer steps."""
    within: float = Field(default=0.1, ge=0)
    """Largest difference from the baseline, as a part of it."""


class Matrix(Section):
    """An experiment."""

    name: str
    """Title of the table."""
    out: str
    """Folder of everything it makes."""
    seeds: list[int] = [0, 1, 2]
    """Each arm is trained with each of them."""
    steps: list[StepSpec] = Field(min_length=1)
    """In order."""
    axes: dict[str, dict[str, dict[str, Settings | None]]] = Field(min_length=1)
    """Axis -> value -> step -> changed settings (`recipe` changes its recipe; null leaves the step out)."""
    baseline: dict[str, str] = {}
    """Axis -> value of the arm that others are compared with; axes that are not named: their first value."""
    scores: list[ScoreSpec] = Field(min_length=1)
    """Columns of the table."""
    launch: dict[str, Any] = {}
    """Options of `slt launch run` (`num_procs: 2`, `hostfile: hosts`, `backend: slurm`)."""
    compute: ComputeSpec | None = None
    """Check that arms cost the same; null = do not."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One combination of values."""

    values: tuple[tuple[str, str], ...]
    """Axis and value, in the order of the axes."""

    @property
    def name(self) -> str:
        return ", ".join(f"{axis}={value}" for axis, value in self.values)

    @property
    def slug(self) -> str:
        return "-".join(f"{axis}.{value}" for axis, value in self.values)


def read_matrix(path: Path) -> Matrix:
    """Read and check an experiment's file.

    Raises:
        RecipeError: lists everything that is wrong with it.
    """
    document = read_document(path)
    problems = [f"{problem.where}: {problem.text}" for problem in document.problems]
    matrix = None
    if not problems:
        try:
            matrix = Matrix.model_validate(document.data)
        except ValidationError as error:
            for found in error.errors():
                place = ".".join(str(part) for part in found["loc"])
                problems.append(f"{document.where(place)}: {place}: {found['msg']}")
    if matrix is not None:
        problems += [f"{document.label}: {text}" for text in _contradictions(matrix)]
    if problems or matrix is None:
        raise RecipeError(f"{len(problems)} problems in the experiment:\n  " + "\n  ".join(problems))
    return matrix


def arms(matrix: Matrix) -> list[Arm]:
    """Every combination of the axes' values; the baseline comes first."""
    axes = [[(axis, value) for value in values] for axis, values in matrix.axes.items()]
    found = [Arm(tuple(combination)) for combination in itertools.product(*axes)]
    first = baseline(matrix)
    return [first, *(arm for arm in found if arm != first)]


def baseline(matrix: Matrix) -> Arm:
    """The arm that others are compared with."""
    return Arm(tuple((axis, matrix.baseline.get(axis, next(iter(values)))) for axis, values in matrix.axes.items()))


def specs_of(matrix: Matrix, arm: Arm) -> list[StepSpec]:
    """The steps of an arm with its changes; those that it leaves out are absent."""
    found = []
    for spec in matrix.steps:
        recipe, settings, there = spec.recipe, dict(spec.set), True
        for axis, value in arm.values:
            changes = matrix.axes[axis][value]
            if spec.name in changes:
                change = changes[spec.name]
                there = there and change is not None
                recipe = (change or {}).get("recipe", recipe)
                settings |= {key: value for key, value in (change or {}).items() if key != "recipe"}
        if there:
            found.append(StepSpec(name=spec.name, recipe=recipe, set=settings))
    return found


def references(settings: Settings) -> set[str]:
    """Names of the steps whose export the settings name."""
    return {name for key, value in settings.items() if not _is_prompt(key) for name in _names(value)}


def replaced(settings: Settings, exports: Mapping[str, str]) -> Settings:
    """Settings with the exports of earlier steps in the place of their names."""
    return {key: value if _is_prompt(key) else _replaced(value, exports) for key, value in settings.items()}


def _is_prompt(key: str) -> bool:
    return key in _PROMPTS or key.startswith("connector.prompts.")


def _names(value: Any) -> set[str]:
    if isinstance(value, str):
        return set(_REFERENCE.findall(value))
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return {name for item in items for name in _names(item)}


def _replaced(value: Any, exports: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _REFERENCE.sub(lambda found: exports.get(found[1], found[0]), value)
    if isinstance(value, Mapping):
        return {key: _replaced(item, exports) for key, item in value.items()}
    return [_replaced(item, exports) for item in value] if isinstance(value, list) else value


def _contradictions(matrix: Matrix) -> Iterator[str]:
    names = [spec.name for spec in matrix.steps]
    yield from (f"step {name!r} is given twice; every step needs a name of its own" for name in _twice(names))
    yield from (f"step {name!r}: use lower-case letters, digits and _" for name in names if not _NAME.fullmatch(name))
    yield from (f"seed {seed} is given twice" for seed in _twice(matrix.seeds))
    if not matrix.seeds:
        yield "seeds: give at least one"
    for axis, values in matrix.axes.items():
        if len(values) < 2:
            yield f"axes.{axis} has {len(values)} value; an axis needs at least two to compare"
        for value, changes in values.items():
            for step in changes.keys() - set(names):
                yield f"axes.{axis}.{value} changes step {step!r}; the steps are {', '.join(names)}"
    for axis, value in matrix.baseline.items():
        if value not in matrix.axes.get(axis, {}):
            known = {name: list(values) for name, values in matrix.axes.items()}
            yield f"baseline: no value {value!r} of an axis {axis!r}; there are {known}"
            return
    yield from _settings_of_two_axes(matrix)
    yield from _unknown_references(matrix)
    yield from _equal_arms(matrix)
    yield from _score_problems(matrix, names)


def _settings_of_two_axes(matrix: Matrix) -> Iterator[str]:
    """Where the order of two axes would decide what a setting becomes."""
    for first, second in itertools.combinations(matrix.axes, 2):
        for step in (spec.name for spec in matrix.steps):
            keys = [
                {key for changes in matrix.axes[axis].values() for key in changes.get(step) or {}}
                for axis in (first, second)
            ]
            for key in sorted(keys[0] & keys[1]):
                yield f"the axes {first} and {second} both change {key} of step {step}; leave it to one of them"


def _unknown_references(matrix: Matrix) -> Iterator[str]:
    told = set()
    for arm in arms(matrix):
        earlier: list[str] = []
        for spec in specs_of(matrix, arm):
            for name in sorted(references(spec.set) - set(earlier)):
                if (spec.name, name) not in told:
                    told.add((spec.name, name))
                    yield (
                        f"step {spec.name} of the arm {arm.name} uses the export of {{{name}}}; before it come "
                        f"{', '.join(earlier) or 'no steps'}"
                    )
            earlier.append(spec.name)


def _equal_arms(matrix: Matrix) -> Iterator[str]:
    seen: dict[str, str] = {}
    for arm in arms(matrix):
        content = repr(specs_of(matrix, arm))
        if content in seen:
            yield f"the arms {seen[content]} and {arm.name} are the same steps with the same settings"
        seen.setdefault(content, arm.name)


def _score_problems(matrix: Matrix, steps: list[str]) -> Iterator[str]:
    yield from (f"score {name!r} is given twice" for name in _twice([score.name for score in matrix.scores]))
    for score in matrix.scores:
        if (score.shards is None) == (score.metric is None):
            yield f"score {score.name}: give either shards, which the model translates, or a metric of training"
        if "references" in score.options:
            yield f"score {score.name}: the table compares with one reference per sample; leave out options.references"
        if score.step is not None and score.step not in steps:
            yield f"score {score.name}: no step {score.step!r}; the steps are {', '.join(steps)}"


def _twice(items: list[Any]) -> list[Any]:
    return sorted({item for item in items if items.count(item) > 1})
