"""From a recipe file to a typed `Recipe`, or one `RecipeError` that lists everything wrong with it.

Precedence: field default < ``extends`` file < recipe file < ``--set a.b=value``. Every value keeps its origin, so
`slt recipe show` can say where each came from and errors can name ``file:line``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config.checks import cross_field_problems, notes
from pipeline.config.deepspeed import deepspeed_problems
from pipeline.config.names import general_name, nearest, nearest_setting, setting_names
from pipeline.config.parts_schema import with_short_form
from pipeline.config.schema import Recipe
from pipeline.config.source import Document, Problem, parse_value, read_document, shown_path
from pipeline.errors import RecipeError

log = logging.getLogger(__name__)

PROJECT_ROOT = Path(__file__).resolve().parents[2]
BUILTIN_RECIPES = PROJECT_ROOT / "launch" / "recipes"
"""Recipes that ship with the project; each can be named without folder and suffix."""

RESOLVED_BLOCK = "resolved"
"""Key under which a resolved recipe records how it was resolved; a recipe file without it is an ordinary one."""

# Stand-ins for required settings that are missing or wrong, so that the other rules can still be checked.
# Verdicts of rules that read such a setting are dropped.
STAND_INS: dict[str, Any] = {
    "name": "x",
    "stage": "continued_pretraining",
    "run_dir": "x",
    "model": {},
    "model.text_encoder.path": "x",
    "model.visual.pose.layout": "openpose",
    "model.visual.features.fingerprint": "x",
    "model.visual.features.width": 1,
    "data": {"train": [{"shards": "x"}]},
    "data.train": [{"shards": "x"}],
    "data.train.N.shards": "x",
    "data.eval.N.shards": "x",
    "train": {"global_batch": 1, "micro_batch": 1, "optimizer": {"lr": 1.0}},
    "train.global_batch": 1,
    "train.micro_batch": 1,
    "train.optimizer": {"lr": 1.0},
    "train.optimizer.lr": 1.0,
    "train.early_stop.patience": 1,
}


Rule = Callable[[Recipe], Iterable[Problem]]


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe together with where each of its values came from."""

    recipe: Recipe
    path: Path
    origins: dict[str, str] = field(default_factory=dict)
    """Dotted setting -> ``file:line`` or ``--set ...``; all other settings hold their default."""
    notes: tuple[str, ...] = ()
    """What is allowed but probably a mistake, such as settings this stage never reads."""
    recorded: dict[str, Any] | None = None
    """The ``resolved`` block when the file is a resolved recipe."""

    def origin(self, path: str) -> str:
        """Where the value of a dotted setting came from; ``default`` if nobody wrote it."""
        return self.origins.get(path, "default")


def load_recipe(path: str | Path, sets: Sequence[str] = ()) -> Recipe:
    """Load, merge and check a recipe.

    Args:
        path: a recipe file, a resolved recipe, or the name of a built-in recipe.
        sets: ``a.b=value`` overrides, values in YAML.

    Raises:
        RecipeError: lists every problem with its place and the nearest valid name.
    """
    return load(path, sets).recipe


def load(path: str | Path, sets: Sequence[str] = (), beyond: Rule | None = None) -> LoadedRecipe:
    """As `load_recipe`, keeping origins and notes.

    Args:
        path: as there.
        sets: as there.
        beyond: finds problems outside the recipe. It is asked only if the recipe itself has some, to tell all at once.
    """
    file = find_recipe(path)
    document = read_document(file)
    recorded = document.data.pop(RESOLVED_BLOCK, None)
    merged = _Merged()
    problems = list(document.problems)
    problems += merged.extend(document, file)
    merged.add(document)
    for text in sets:
        problems += merged.set(text)
    if document.data or not document.problems:
        recipe, field_problems = _validate(merged, beyond)
        problems += field_problems
    else:
        recipe = None
    if problems or recipe is None:
        raise RecipeError(problem_message(shown_path(file), problems, merged.origins))
    remarks = tuple(notes(recipe, merged.origins))
    for remark in remarks:
        log.warning("%s: %s", shown_path(file), remark)
    return LoadedRecipe(recipe, file, merged.origins, remarks, recorded if isinstance(recorded, dict) else None)


def find_recipe(path: str | Path) -> Path:
    """The file of a path or of a built-in recipe's name."""
    named = Path(path)
    if named.is_file():
        return named
    if named.parent == Path("."):
        builtin = BUILTIN_RECIPES / f"{named.name.removesuffix('.yaml')}.yaml"
        if builtin.is_file():
            return builtin
    names = sorted(file.stem for file in BUILTIN_RECIPES.glob("*.yaml"))
    if named.is_dir():
        raise RecipeError(f"{named} is a folder; name a recipe file inside it")
    hint = nearest(named.name.removesuffix(".yaml"), names)
    raise RecipeError(f"{named} is neither a recipe file nor a built-in recipe{hint}\n  built in: {', '.join(names)}")


class _Merged:
    """The settings of all sources in precedence order, with their origins."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def extend(self, document: Document, path: Path) -> list[Problem]:
        """Merge the file named by ``extends``: relative to the recipe, or a built-in name. One level only."""
        if "extends" not in document.data:
            return []
        name, where = document.data.pop("extends"), document.where("extends")
        if not isinstance(name, str):
            return [Problem(f"extends must name one recipe, got {name!r}", where=where)]
        beside = path.parent / name
        try:
            base_path = beside if beside.is_file() else find_recipe(name)
        except RecipeError as error:
            return [Problem(f"extends: {error}", where=where)]
        if base_path.resolve() == path.resolve():
            return [Problem("extends names the recipe itself", where=where)]
        base = read_document(base_path)
        base.data.pop(RESOLVED_BLOCK, None)
        problems = list(base.problems)
        if "extends" in base.data:
            text = (
                f"extends works one level deep, but {base_path} extends {base.data.pop('extends')!r}; copy its settings"
            )
            problems.append(Problem(text, where=where))
        self.add(base)
        return problems

    def add(self, document: Document) -> None:
        self._merge(self.data, document.data, "", document)

    def _merge(self, into: dict[str, Any], new: dict[str, Any], prefix: str, document: Document) -> None:
        for key, value in new.items():
            path = f"{prefix}{key}"
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                self._merge(into[key], value, f"{path}.", document)
                continue
            self._forget(path)
            into[key] = value
            for line_path in document.lines:
                if line_path == path or line_path.startswith(f"{path}."):
                    self.origins[line_path] = document.where(line_path)

    def _forget(self, path: str) -> None:
        for known in [k for k in self.origins if k == path or k.startswith(f"{path}.")]:
            del self.origins[known]

    def set(self, text: str) -> list[Problem]:
        """Apply one ``a.b=value``; a number as a path part selects a list item."""
        where = f"--set {text}"
        path, equals, raw = text.partition("=")
        path = path.strip()
        keys = path.split(".")
        if not equals or not all(keys):
            return [Problem("must look like a.b=value", where=where)]
        try:
            value = parse_value(raw)
        except ValueError as error:
            return [Problem(f"the value {raw!r} is not valid YAML: {error}", where=where)]
        holder: Any = self.data
        for depth, part in enumerate(keys):
            here, last = ".".join(keys[: depth + 1]), depth == len(keys) - 1
            if isinstance(holder, list):
                if not part.isdigit() or int(part) >= len(holder):
                    return [Problem(f"{here}: give a list position 0..{len(holder) - 1}", where=where)]
                slot: Any = int(part)
            elif isinstance(holder, dict):
                slot = part
            else:
                return [Problem(f"{here}: {'.'.join(keys[:depth])} is a value, not a section", where=where)]
            if last:
                self._forget(here)
                holder[slot] = value
                self.origins.update(dict.fromkeys(_paths_of(value, here), where))
            else:
                if isinstance(holder, dict) and holder.get(slot) is None:
                    holder[slot] = {}
                    self.origins[here] = where
                holder = holder[slot]
        return []


def _paths_of(value: Any, path: str) -> Iterator[str]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths_of(inner, f"{path}.{key}")


def _validate(merged: _Merged, beyond: Rule | None = None) -> tuple[Recipe | None, list[Problem]]:
    """Check types and names, then the cross-field rules on whatever is sound, so that one run shows everything."""
    try:
        # through JSON, because strict validation of Python objects would refuse a list for a tuple field
        recipe = Recipe.model_validate_json(json.dumps(with_short_form(merged.data)), strict=True)
    except ValidationError as error:
        errors = _one_per_setting(error.errors(include_url=False))
        problems = [_field_problem(item) for item in errors]
        bad = [".".join(str(part) for part in item["loc"]) for item in errors]
        if "stage" in bad:  # it says which inputs matter
            beyond = None
        return None, problems + [p for p in _rules_on_sound_part(merged.data, errors, beyond) if not _touches(p, bad)]
    problems = [*cross_field_problems(recipe), *deepspeed_problems(recipe)]
    named = [name for problem in problems for name in problem.fields]
    found = beyond(recipe) if problems and beyond is not None else ()
    return recipe, [*problems, *(problem for problem in found if not _touches(problem, named))]


def _one_per_setting(errors: Iterable[Any]) -> list[Any]:
    """Where a setting takes several types, pydantic gives an error for each, under the type's name."""
    kept: dict[tuple[Any, ...], Any] = {}
    for item in errors:
        loc = item["loc"]
        ends = (end for end in range(1, len(loc)) if _is_type(loc, end) and item["type"] != "extra_forbidden")
        path = loc[: next(ends, len(loc))]
        if path in kept and len(path) < len(loc):
            message = item["msg"].removeprefix("Input should be ")
            kept[path] = {**kept[path], "type": "union", "msg": f"{kept[path]['msg']} or {message}"}
        else:
            kept[path] = {**item, "loc": path, "type": item["type"] if path == loc else "union"}
    return list(kept.values())


def _is_type(loc: tuple[Any, ...], end: int) -> bool:
    """Whether ``loc[end]`` follows a setting and names no setting itself."""
    setting, below = (general_name(".".join(map(str, loc[:stop]))) for stop in (end, end + 1))
    named = any(name.startswith(f"{setting}.NAME.") for name in setting_names())
    return isinstance(loc[end], str) and setting in setting_names() and below not in setting_names() and not named


def _rules_on_sound_part(data: dict[str, Any], errors: Iterable[Any], beyond: Rule | None) -> list[Problem]:
    sound = json.loads(json.dumps(with_short_form(data)))
    for item in errors:
        _replace(sound, [str(part) for part in item["loc"]])
    try:
        recipe = Recipe.model_validate_json(json.dumps(sound), strict=True)
    except ValidationError:
        return []  # the damage is not local; report only the problems found so far
    return [*cross_field_problems(recipe), *deepspeed_problems(recipe), *(beyond(recipe) if beyond else ())]


def _replace(data: dict[str, Any], loc: list[str]) -> None:
    """Drop a wrong or unknown setting, or put a stand-in for a required one."""
    holder: Any = data
    for depth, part in enumerate(loc[:-1]):
        holder = holder[int(part)] if isinstance(holder, list) else holder.get(part)
        if isinstance(holder, list) and depth == len(loc) - 2:  # an item is wrong: give up the whole list
            return _replace(data, loc[:-1])
        if not isinstance(holder, dict | list):
            return None
    holder.pop(loc[-1], None)
    stand_in = STAND_INS.get(general_name(".".join(loc)))
    if stand_in is not None:
        holder[loc[-1]] = json.loads(json.dumps(stand_in))
    return None


def _touches(problem: Problem, bad: Iterable[str]) -> bool:
    """Whether a rule read a setting that is itself wrong (its verdict then means nothing)."""
    return any(
        name == path or name.startswith(f"{path}.") or path.startswith(f"{name}.")
        for name in problem.fields
        for path in bad
    )


def _field_problem(error: Any) -> Problem:
    path = ".".join(str(part) for part in error["loc"])
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        close = nearest_setting(path)
        return Problem(f"{path} is not a setting" + (f"; did you mean {close}?" if close else ""), (path,))
    if kind == "missing":
        return Problem(f"{path} is missing", (path,))
    shown = "nothing" if value is None else "a section" if isinstance(value, dict) else repr(value)
    if kind == "literal_error":
        expected = error["ctx"]["expected"]
        hint = nearest(str(value), expected.replace("'", "").replace(" or ", ", ").split(", "))
        return Problem(f"{path} must be {expected}, got {shown}{hint}", (path,))
    if kind == "model_type":
        return Problem(f"{path} must be a section with its own settings, got {shown}", (path,))
    message = error["msg"].replace("Input should be", "must be", 1).replace("Input should", "must", 1)
    separator = " " if message.startswith("must") else ": "
    return Problem(f"{path}{separator}{message[0].lower()}{message[1:]}, got {shown}", (path,))


def _origin(origins: dict[str, str], path: str) -> str:
    """The origin of a setting, or of the nearest section around it that was written."""
    while path:
        if path in origins:
            return origins[path]
        path = path.rpartition(".")[0]
    return ""


def problem_message(label: str, problems: Sequence[Problem], origins: dict[str, str]) -> str:
    """All problems of a recipe as one paragraph, each with the place of its setting."""
    lines = []
    for problem in problems:
        where = problem.where or next((o for o in (_origin(origins, name) for name in problem.fields) if o), label)
        lines.append(f"{where}: {problem.text}")
    unique = list(dict.fromkeys(lines))
    count = f"{len(unique)} problem{'s' if len(unique) != 1 else ''}"
    return f"{label} cannot be used: {count}\n" + "\n".join(f"  {line}" for line in unique)


__all__ = ["BUILTIN_RECIPES", "PROJECT_ROOT", "LoadedRecipe", "find_recipe", "load", "load_recipe", "problem_message"]
