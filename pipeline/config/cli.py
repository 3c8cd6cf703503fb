"""`slt recipe check|show|diff`: everything about a recipe that needs no GPU, no network and no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console
from rich.table import Table

from pipeline.config.gpu_memory import GPU_MEMORY, gpu_gib
from pipeline.config.load import RESOLVED_BLOCK, LoadedRecipe, load
from pipeline.config.preflight import check_memory, check_recipe, load_with_inputs
from pipeline.config.resolve import ResolvedRecipe, resolve
from pipeline.config.source import dump_yaml, shown_path
from pipeline.errors import EXIT_INTERRUPTED, SltError
from shards.terminal import table_console

app = typer.Typer(no_args_is_help=True, help="Check, show and compare recipes. Touches no GPU and no network.")

RecipeArgument = Annotated[str, typer.Argument(help="Recipe file, resolved recipe, or name of a built-in recipe.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="a.b=value, value in YAML; may be repeated.")]
WorldSizeOption = Annotated[int | None, typer.Option("--world-size", min=1, help="Default: those of the recipe.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
SettingsOnlyOption = Annotated[
    bool, typer.Option("--settings-only", help="Do not look at this machine: shards, models, disk.")
]

_UNSET = "(not set)"


@app.command(epilog="Example: slt recipe check demo_contrastive --world-size 2 --set train.global_batch=8")
def check(
    recipe: RecipeArgument,
    world_size: WorldSizeOption = None,
    sets: SetOption = None,
    gpu_memory: Annotated[str | None, typer.Option(help=GPU_MEMORY)] = None,
    settings_only: SettingsOnlyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Report every problem of a recipe and of what it reads, or its batch arithmetic per world size."""
    memory = [] if gpu_memory is None else [f"deepspeed.gpu_memory_gib={gpu_gib(gpu_memory)}"]
    loaded = (load if settings_only else load_with_inputs)(recipe, [*(sets or []), *memory])
    sizes = _world_sizes(loaded, world_size)
    if not settings_only:
        check_recipe(loaded, sizes)
    resolved = [resolve(loaded.recipe, size) for size in sizes]
    if not settings_only:
        for item in resolved:
            check_memory(item)
    rows = [_batch_row(item) for item in resolved]
    if as_json:
        _print_json({"recipe": str(loaded.path), "ok": True, "notes": list(loaded.notes), "world_sizes": rows})
        return
    console = table_console(markup=False, emoji=False)
    table = Table(
        title=f"{loaded.recipe.name} ({loaded.recipe.stage}) from {shown_path(loaded.path)}", title_justify="left"
    )
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    console.print("ok", style="green", highlight=False)


@app.command(epilog="Example: slt recipe show demo_connector --set train.steps=10")
def show(
    recipe: RecipeArgument, world_size: WorldSizeOption = None, sets: SetOption = None, as_json: JsonOption = False
) -> None:
    """Print the resolved recipe with the origin of every value."""
    loaded = load(recipe, sets or [])
    resolved = resolve(loaded.recipe, _world_sizes(loaded, world_size)[0])
    data = resolved.to_dict()
    if as_json:
        names = [path for path, _ in _leaves(data) if not path.startswith(f"{RESOLVED_BLOCK}.")]
        _print_json({**data, "origins": {name: loaded.origin(name) for name in names}})
        return
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for line in _annotated(data, loaded):
        console.print(line)


@app.command(epilog="Example: slt recipe diff demo_connector spj_connector")
def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="Recipe file or built-in name.")],
    right: Annotated[str, typer.Argument(metavar="B", help="Recipe file or built-in name.")],
    world_size: WorldSizeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the settings in which two resolved recipes differ."""
    sides = []
    for name in (left, right):
        loaded = load(name)
        sides.append(dict(_leaves(resolve(loaded.recipe, _world_sizes(loaded, world_size)[0]).to_dict())))
    names = list(dict.fromkeys([*sides[0], *sides[1]]))
    pairs = {name: (sides[0].get(name, _UNSET), sides[1].get(name, _UNSET)) for name in names}
    changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if as_json:
        _print_json({name: {"a": a, "b": b} for name, (a, b) in changed.items()})
        return
    console = table_console(highlight=False, markup=False, emoji=False)
    if not changed:
        console.print("no differences")
        return
    table = Table(title=f"{len(changed)} differences", title_justify="left")
    for header in ("setting", left, right):
        table.add_column(header, overflow="fold")
    for name, (a, b) in changed.items():
        table.add_row(name, _inline(a), _inline(b))
    console.print(table)


def run_app(application: typer.Typer, arguments: list[str] | None = None) -> NoReturn:
    """Run a command line; our own errors become one paragraph on stderr and their exit code."""
    try:
        application(args=arguments)
    except SltError as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False).print(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def _world_sizes(loaded: LoadedRecipe, requested: int | None) -> list[int]:
    if requested is not None:
        return [requested]
    recorded = (loaded.recorded or {}).get("world_size")
    return [recorded] if isinstance(recorded, int) else list(loaded.recipe.train.world_sizes)


def _batch_row(resolved: ResolvedRecipe) -> dict[str, int]:
    train = resolved.recipe.train
    return {
        "world_size": resolved.world_size,
        "micro_batch": train.micro_batch,
        "accumulation_steps": resolved.accumulation_steps,
        "global_batch": train.global_batch,
        "zero_stage": resolved.ds_config["zero_optimization"]["stage"],
    }


def _leaves(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything without further settings inside; empty containers count as values."""
    items: Any = ()
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, list) and any(isinstance(item, dict) for item in data):
        items = enumerate(data)
    if not items:
        yield prefix, data
        return
    for key, value in items:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _annotated(data: dict[str, Any], loaded: LoadedRecipe) -> Iterator[str]:
    """The resolved YAML line by line; lines that set a value end with where it came from."""
    origins = {path: loaded.origin(path) for path, _ in _leaves(data) if not path.startswith(f"{RESOLVED_BLOCK}.")}
    text = dump_yaml(data)
    notes: dict[int, str] = {}
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for path, line in _lines(root, ""):
        if path in origins:
            notes[line] = origins[path]
    for number, shown in enumerate(text.splitlines()):
        yield f"{shown:<48}  # {notes[number]}" if number in notes else shown


def _lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}.{key.value}" if prefix else str(key.value)
            # the comment follows the value if that is a single line, else its key
            if value.start_mark.line == key.start_mark.line:
                yield path, value.end_mark.line if isinstance(value, yaml.ScalarNode) else key.start_mark.line
            else:
                yield path, key.start_mark.line
            yield from _lines(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _lines(value, f"{prefix}.{number}")


def _inline(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def main() -> NoReturn:
    run_app(app)


if __name__ == "__main__":
    main()

__all__ = ["app", "main", "run_app"]
