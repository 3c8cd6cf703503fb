"""``docs/recipe-reference.md`` says what the schema says. ``make reference`` writes it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from pipeline.config import schema
from tests.source_tree import ROOT, sources

PAGE = ROOT / "docs" / "recipe-reference.md"
FILES = tuple(source.path for source in sources("pipeline/config") if source.module.endswith("schema"))
HEAD = """# Recipe reference

Every setting, from the types in [`schema.py`](../pipeline/config/schema.py) and the files beside it whose names end
in `_schema.py`. Written by `make reference`; how settings are combined and checked is in [recipes](recipes.md).
"""


def render() -> str:
    """The page: one table per section of the recipe, in the order a reader meets them."""
    files = [source for source in sources("pipeline/config") if source.path in FILES]
    classes = {node.name: node for file in files for node in file.tree.body if isinstance(node, ast.ClassDef)}
    parts = [HEAD]
    for path, name in _sections(classes, "Recipe", ""):
        title = f"`{path}`" if path else "The recipe"
        about = ast.get_docstring(classes[name]) or ""
        parts.append(f"## {title}\n{about}\n\n| setting | type | default | meaning |\n| --- | --- | --- | --- |")
        parts += [_row(field, text, set(classes)) for field, text in _fields(classes[name])]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _sections(classes: dict[str, ast.ClassDef], name: str, path: str) -> Iterator[tuple[str, str]]:
    yield path, name
    for field, _ in _fields(classes[name]):
        annotation = ast.unparse(field.annotation)
        inner = next(
            (known for known in classes if known in annotation.replace("[", " ").replace("]", " ").split()), None
        )
        if inner is not None and field.target.id != "eval":  # type: ignore[union-attr]
            dotted = f"{path}.{field.target.id}".lstrip(".")  # type: ignore[union-attr]
            item = ".N" if "list[" in annotation else ".NAME" if "dict[" in annotation else ""
            yield from _sections(classes, inner, dotted + item)


def _fields(section: ast.ClassDef) -> list[tuple[ast.AnnAssign, str]]:
    """(field, docstring below it) of a section."""
    found = []
    for node, after in zip(section.body, [*section.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            literal = after.value if isinstance(after, ast.Expr) else None
            text = literal.value if isinstance(literal, ast.Constant) and isinstance(literal.value, str) else ""
            found.append((node, " ".join(text.split())))
    return found


def _row(field: ast.AnnAssign, text: str, classes: set[str]) -> str:
    annotation, value = ast.unparse(field.annotation), field.value
    bounds = ""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        bounds = ", ".join(f"{signs[k.arg]} {ast.unparse(k.value)}" for k in value.keywords if k.arg in signs)
        named = next((k.value for k in value.keywords if k.arg == "default"), None)
        value = value.args[0] if value.args else named
    if isinstance(value, ast.Name):  # a constant that models read as well
        value = ast.Constant(getattr(schema, value.id))
    default = "required" if value is None else "" if _is_section(value, classes) else f"`{ast.unparse(value)}`"
    kind = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace("'", "`").replace(", ", " or "), annotation)
    signed = {"gt=": "> ", "lt=": "< "}
    kind = re.sub(r"Annotated\[(\w+), Field\((.*?)\)\]", lambda m: f"{m[1]} {_signs(m[2], signed)}", kind)
    kind = kind.replace("|", "\\|") + (f" {bounds}" if bounds else "")
    escaped = text.replace("|", "\\|")
    return f"| `{field.target.id}` | {kind} | {default} | {escaped} |"  # type: ignore[union-attr]


def _signs(bounds: str, signs: dict[str, str]) -> str:
    for name, sign in signs.items():
        bounds = bounds.replace(name, sign)
    return bounds


def _is_section(value: ast.expr, classes: set[str]) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) in classes


def test_the_reference_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `make reference`"


def test_every_setting_says_what_it_means() -> None:
    file = next(source for source in sources("pipeline") if source.path == "pipeline/config/schema.py")
    silent = [
        f"{node.name}.{field.target.id}"  # type: ignore[union-attr]
        for node in file.tree.body
        if isinstance(node, ast.ClassDef)
        for field, text in _fields(node)
        if not text
    ]
    assert not silent, f"no docstring under {silent}"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
