"""Every recipe field is read by some code: an option that changes nothing is a lie in the recipe.

A field counts as read where a library file outside the schema reads an attribute of its name and also knows the
section: it names the section's class, or reaches it through the attribute that holds it (``recipe.train.steps``).
"""

from __future__ import annotations

import ast
import functools

from tests.source_tree import LIBRARY, Source, sources

SCHEMA = "pipeline/config/schema.py"
NOT_READ_YET: frozenset[str] = frozenset()
"""`Section.field` entries that wait for their code; must end empty."""


@functools.cache
def _sections() -> dict[str, dict[str, str]]:
    """Class name -> field name -> annotation, for every recipe section."""
    schema = next(source for source in sources("pipeline") if source.path == SCHEMA)
    return {
        node.name: {
            item.target.id: ast.unparse(item.annotation)
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        for node in schema.tree.body
        if isinstance(node, ast.ClassDef) and node.name != "Section"
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
        if source.path == SCHEMA or field not in _attributes_read(source):
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
