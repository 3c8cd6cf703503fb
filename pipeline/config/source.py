"""Recipe text: YAML with the line of every setting, duplicate keys refused, numbers read as YAML 1.2 does.

PyYAML follows YAML 1.1, where `1e-4` is a string, `no` a boolean and `010` eight. Recipes are read with the
YAML 1.2 core rules instead, and written so that readers of either version agree.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$")
_SIMPLE_TAGS = {"null", "bool", "int", "float", "str"}


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core rules for plain scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}  # noqa: RUF012 (PyYAML's own protocol)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _RecipeDumper(yaml.SafeDumper):
    """SafeDumper that also quotes strings which only YAML 1.2 would read as numbers (`1e-4`)."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML folds these three like line breaks and reads back a space
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    yaml_representers: ClassVar[dict[type, Any]] = {
        **yaml.SafeDumper.yaml_representers,
        str: represent_str,
    }


_RecipeDumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a recipe."""

    text: str
    fields: tuple[str, ...] = ()
    """Dotted settings the rule read; the first one that the user wrote gives the place in the message."""
    where: str = ""
    """``file:line`` or the ``--set`` argument, if already known."""


@dataclass(slots=True)
class Document:
    """One YAML file as plain data, with the line of every key and list item."""

    label: str
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    """Dotted path -> 1-based line."""
    problems: list[Problem] = field(default_factory=list)

    def where(self, path: str) -> str:
        """``file:line`` of a dotted path, or the file alone."""
        return f"{self.label}:{self.lines[path]}" if path in self.lines else self.label


def read_document(path: Path, text: str | None = None) -> Document:
    """Parse a recipe file (or its given text). Syntax errors and duplicate keys become problems, not exceptions."""
    document = Document(label=shown_path(path))
    try:
        raw = path.read_text(encoding="utf-8") if text is None else text
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        document.problems.append(Problem(f"cannot be read: {reason}", where=document.label))
        return document
    try:
        loader = _RecipeLoader(raw)
        node = loader.get_single_node()
        if node is None:
            document.problems.append(
                Problem("is empty; a recipe needs at least name, stage, run_dir", where=document.label)
            )
        elif not isinstance(node, yaml.MappingNode):
            document.problems.append(Problem("must be a mapping of settings (key: value)", where=document.label))
        else:
            document.data = _Converter(loader, document).convert(node, "")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error)
        where = f"{document.label}:{mark.line + 1}" if mark is not None else document.label
        document.problems.append(Problem(f"is not valid YAML: {what}", where=where))
    return document


def shown_path(path: Path) -> str:
    """A path as messages show it: relative if below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def parse_value(text: str) -> Any:
    """One YAML value, as written after ``--set a.b=``.

    Raises:
        ValueError: the text is not valid YAML; the message says why.
    """
    document = Document(label="")
    try:
        loader = _RecipeLoader(text)  # refuses non-text, such as control characters
        node = loader.get_single_node()
        value = None if node is None else _Converter(loader, document).convert(node, "")
        loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(getattr(error, "problem", None) or str(error)) from error
    if document.problems:
        raise ValueError(document.problems[0].text)
    return value


def as_value(text: str) -> str:
    """Text that `parse_value` reads back: plain if possible, else in quotes."""
    try:
        plain = parse_value(text) == text
    except ValueError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)


def dump_yaml(data: Any) -> str:
    """Plain data as YAML text in the given key order; `read_document` gives the same data back."""
    return yaml.dump(data, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


class _Converter:
    """Turns composed nodes into plain data; notes lines, duplicates and what recipes do not allow."""

    def __init__(self, loader: _RecipeLoader, document: Document) -> None:
        self.loader, self.document = loader, document
        self.open: list[int] = []

    def convert(self, node: yaml.Node, path: str) -> Any:
        if id(node) in self.open:
            self._problem(node, f"{path} contains itself through a YAML alias")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self.open.append(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            assert isinstance(node, yaml.SequenceNode)
            return [self._item(child, f"{path}.{number}") for number, child in enumerate(node.value)]
        finally:
            self.open.pop()

    def _item(self, node: yaml.Node, path: str) -> Any:
        self.document.lines[path] = node.start_mark.line + 1
        return self.convert(node, path)

    def _scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        if node.tag.rpartition(":")[2] not in _SIMPLE_TAGS:
            self._problem(node, f"{path} has the YAML tag {node.tag}; recipes hold plain values only")
            return None
        try:
            return self.loader.construct_object(node)
        except ValueError as error:
            self._problem(node, f"{path}: {node.value!r} is not a {node.tag.rpartition(':')[2]}: {error}")
            return None

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, f"{path or 'the recipe'} has a key that is not a plain word")
                continue
            key = str(key_node.value)
            here = f"{path}.{key}" if path else key
            if key in result:
                first = self.document.lines[here]
                self._problem(key_node, f"{here} is given twice (first in line {first}); keep one")
                continue
            self.document.lines[here] = key_node.start_mark.line + 1
            result[key] = self.convert(value_node, here)
        return result

    def _problem(self, node: yaml.Node, text: str) -> None:
        line = node.start_mark.line + 1
        where = f"{self.document.label}:{line}" if self.document.label else ""
        self.document.problems.append(Problem(text, where=where))


__all__ = ["Document", "Problem", "as_value", "dump_yaml", "parse_value", "read_document", "shown_path"]
