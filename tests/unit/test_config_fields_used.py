"""Every recipe field is read by some code: an option that changes nothing is a lie in the recipe.

A field counts as read where a library file outside the schema reads an attribute of its name and also knows the
section: it names the section's class, or reaches it through the attribute that holds it (``recipe.train.steps``).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from typing import get_args

import pytest
from pydantic import BaseModel

from pipeline.config.schema import Recipe
from pipeline.config.stages import STAGES
from tests.source_tree import LIBRARY, FunctionNode, Source, imported_modules, sources, within

SCHEMA = tuple(source.path for source in sources("pipeline") if source.module.endswith("schema"))
NOT_READ_YET: frozenset[str] = frozenset()
"""`Section.field` entries that wait for their code; must end empty."""


@functools.cache
def _sections() -> dict[str, dict[str, str]]:
    """Class name -> field name -> annotation, for every recipe section."""
    nodes = [node for source in sources("pipeline") if source.path in SCHEMA for node in source.tree.body]
    return {
        node.name: {
            item.target.id: ast.unparse(item.annotation)
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        for node in nodes
        if isinstance(node, ast.ClassDef)
    }


def _holders(section: str) -> set[str]:
    """Names of the fields whose value is this section (``word`` holds WordLevelConfig)."""
    return {
        field
        for fields in _sections().values()
        for field, annotation in fields.items()
        if section in annotation.replace("[", " ").replace("]", " ").replace("|", " ").split()
    }


@functools.cache
def _attributes_read(source: Source) -> frozenset[str]:
    return frozenset(
        node.attr
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    )


@functools.cache
def _names(source: Source) -> frozenset[str]:
    """Names the file mentions, also inside quoted annotations."""
    names = {node.id for node in ast.walk(source.tree) if isinstance(node, ast.Name)}
    names |= {alias.name for node in ast.walk(source.tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return frozenset(names)


def _is_read(section: str, field: str) -> bool:
    for source in sources(*LIBRARY):
        if source.path in SCHEMA or field not in _attributes_read(source):
            continue
        if section in _names(source) or section == "Recipe" or _holders(section) & _attributes_read(source):
            return True
    return False


ALL_FIELDS = sorted(f"{section}.{field}" for section, fields in _sections().items() for field in fields)


def test_every_recipe_field_is_read() -> None:
    dead = [name for name in ALL_FIELDS if not _is_read(*name.split(".")) and name not in NOT_READ_YET]
    assert not dead, "no code reads these recipe fields:\n" + "\n".join(dead)


def test_the_waiting_list_only_shrinks() -> None:
    stale = [name for name in NOT_READ_YET if name not in ALL_FIELDS or _is_read(*name.split("."))]
    assert not stale, f"read or gone: take these off NOT_READ_YET: {sorted(stale)}"


# -- per stage -------------------------------------------------------------------------------------------------------
# Code that a training run of a stage does not pass through, or that reads every setting whatever the stage.
_OTHER_CODE = (
    *(path.removesuffix(".py").replace("/", ".") for path in SCHEMA),
    "pipeline.config.checks", "pipeline.config.transfer_checks", "pipeline.config.unread", "pipeline.config.cli",
    "pipeline.demo", "pipeline.inference.translate", "pipeline.inference.extract_features",
    "launch.slt", "pipeline.stages.registry",
    "pipeline.evaluate.run", "pipeline.evaluate.cli", "launch.cli", "pipeline.config.inputs",
    "pipeline.export", "pipeline.memory", "pipeline.config.widths", "pipeline.config.planner",
)  # fmt: skip


@functools.cache
def _stage_files() -> dict[str, set[str]]:
    """Module of `pipeline.stages` -> the stages that pass through it: whose own module imports it, at any distance."""
    imports = {s.module: {name for _, name in imported_modules(s)} for s in sources("pipeline")}
    stages: dict[str, set[str]] = {name: set() for name in imports if name.startswith("pipeline.stages.")}
    for stage, entry in STAGES.items():
        waiting = [entry.implementation.partition(":")[0]]
        while waiting:
            module = waiting.pop()
            if module in stages and stage not in stages[module]:
                stages[module].add(stage)
                waiting += imports[module]
    return stages


CHECKED_BEFORE = frozenset({"train.world_sizes", "deepspeed.gpu_memory_gib"})
"""Settings that are used up before a run starts: by the rules between settings, and by the memory planner."""


@functools.cache
def _stage_sources(stage: str) -> tuple[Source, ...]:
    others = [module for module, stages in _stage_files().items() if stage not in stages]
    return tuple(s for s in sources("pipeline", "launch") if not within(s.module, *_OTHER_CODE, *others))


def _definitions(stage: str) -> dict[str, list[tuple[Source, ast.AST]]]:
    """Functions, methods and classes by name; a class stands for all of its methods."""
    found: dict[str, list[tuple[Source, ast.AST]]] = {}
    for source in _stage_sources(stage):
        for node in ast.walk(source.tree):
            # methods of a stage count only where something calls them
            skipped = isinstance(node, ast.ClassDef) and within(source.module, "pipeline.stages")
            if isinstance(node, FunctionNode | ast.ClassDef) and not skipped:
                found.setdefault(node.name, []).append((source, node))
    return found


def _identifiers(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
    }


@functools.cache
def _reached(stage: str) -> tuple[tuple[Source, frozenset[str]], ...]:
    """Attributes read by what a run of the stage may pass through: the engine, and whatever is named on the way."""
    definitions = _definitions(stage)
    waiting: list[tuple[Source, ast.AST]] = [
        (s, s.tree) for s in _stage_sources(stage) if within(s.module, "pipeline.engine", "launch.train")
    ]
    reached: list[tuple[Source, frozenset[str]]] = []
    seen: set[str] = set()
    while waiting:
        source, node = waiting.pop()
        loads = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load))
        reached.append((source, frozenset(n.attr for n in loads)))
        for name in _identifiers(node) - seen:
            seen.add(name)
            waiting += definitions.get(name, [])
    return tuple(reached)


def _paths(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted path, section class, field) of every setting that is no section."""
    for name, field in section.model_fields.items():
        inner = next((kind for kind in _models(field.annotation)), None)
        if inner is None:
            yield f"{prefix}{name}", section.__name__, name
        else:
            yield from _paths(inner, f"{prefix}{name}.")


def _models(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for argument in get_args(annotation) for kind in _models(argument)]


def _is_read_by(stage: str, section: str, field: str) -> bool:
    for source, attributes in _reached(stage):
        if field in attributes and (
            section == "Recipe" or section in _names(source) or _holders(section) & _attributes_read(source)
        ):
            return True
    return False


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_every_stage_reads_what_it_accepts_without_a_word(stage: str) -> None:
    """What a stage does not read is named in `pipeline.config.stages`, so that a recipe that sets it is told."""
    dead = [
        path
        for path, section, field in _paths(Recipe)
        if path not in CHECKED_BEFORE
        and not any(f"{path}.".startswith(f"{name}.") for name in STAGES[stage].unread)
        and not _is_read_by(stage, section, field)
    ]
    assert not dead, f"the {stage} stage does not read these settings:\n" + "\n".join(dead)


LEFT_OUT = [
    (stage, path, section, field)
    for stage, needs in sorted(STAGES.items())
    for path, section, field in _paths(Recipe)
    if path in needs.unread and path != "train.peak_tflops"  # the trainer reads it, for stages that count FLOPs
]


@pytest.mark.parametrize(("stage", "path", "section", "field"), LEFT_OUT, ids=[f"{c[0]}-{c[1]}" for c in LEFT_OUT])
def test_the_search_sees_that_a_setting_is_left_out(stage: str, path: str, section: str, field: str) -> None:
    assert not _is_read_by(stage, section, field), f"{stage} may read {path}: take it off STAGES"
