"""The architecture's rules, held by reading the syntax trees: sizes, import directions, where side effects may live.

Lines are counted as they stand in the file: a function's from its ``def`` to its last line, docstring included, so
that one number answers "does it fit on a screen". When a limit hurts, split; the numbers do not move.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator

from tests.source_tree import EVERYTHING, LIBRARY, ROOT, FunctionNode, Source, dotted, imported_modules, sources, within

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7
MAX_TRAINER_LOOP_LINES = 90

DISTRIBUTED_PACKAGES = ("torch.distributed", "deepspeed")
DISTRIBUTED_CODE = ("pipeline.dist", "pipeline.engine")
ENVIRONMENT_CODE = ("pipeline.dist", "launch")
TORCH_IN_SHARDS = ("shards.load.loader",)

# A module may import from its own package and from these; the first matching rule counts. What is not listed here
# (pipeline.demo) sits on top and may import everything.
IMPORT_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("shards", ()),
    ("ds_configs", ()),
    # the front door, its commands on checkpoints and the rank stand above both packages
    ("launch.train", ("pipeline", "shards", "launch")),
    ("launch.slt", ("pipeline", "shards", "launch")),
    ("launch.checkpoints_cli", ("pipeline", "shards", "launch")),
    # what a run says of its time is read without torch
    ("launch", ("pipeline.config", "pipeline.errors", "pipeline.engine.goodput")),
    ("pipeline.errors", ("shards.errors",)),
    ("pipeline.config", ("pipeline.errors", "ds_configs", "shards.text")),
    ("pipeline.dist", ("pipeline.errors",)),
    ("pipeline.losses", ("pipeline.dist", "pipeline.errors")),
    ("pipeline.models", ("pipeline.losses", "pipeline.dist", "pipeline.config", "pipeline.errors", "shards")),
    (
        "pipeline.stages",
        (
            *("pipeline.models", "pipeline.losses", "pipeline.dist", "pipeline.config", "pipeline.errors", "shards"),
            # held-out scores during training come from the very code that `slt evaluate` runs
            *("pipeline.inference", "pipeline.evaluate.metrics", "pipeline.evaluate.retrieval"),
            "pipeline.evaluate.word_errors",
        ),
    ),
    # puts the stage of the recipe and the trainer together
    (
        "pipeline.engine.run",
        ("pipeline.engine", "pipeline.stages", "pipeline.config", "pipeline.dist", "pipeline.errors"),
    ),
    (
        "pipeline.engine",
        (
            *("pipeline.stages.base", "pipeline.stages.batches", "pipeline.stages.data", "pipeline.stages.freezing"),
            *("pipeline.memory", "pipeline.config", "pipeline.dist", "pipeline.errors"),
            *("shards.load.loader", "shards.load.requests", "shards.order.plan"),
        ),
    ),
    (
        "pipeline.export",
        (
            *("pipeline.models", "pipeline.config", "pipeline.errors", "shards"),
            # a stage says what its export must repeat
            "pipeline.stages.registry",
            # the modules that read what a run left behind
            *("pipeline.engine.checkpoint", "pipeline.engine.durable", "pipeline.engine.metrics"),
            "pipeline.engine.zero_shards",
        ),
    ),
    ("pipeline.memory", ("pipeline.models", "pipeline.config", "pipeline.errors")),
    ("pipeline.inference", ("pipeline.models", "pipeline.config", "pipeline.errors", "shards")),
    (
        "pipeline.experiment",
        (
            *("pipeline.config", "pipeline.errors", "pipeline.evaluate", "shards"),
            # what runs left behind
            *("pipeline.engine.goodput", "pipeline.engine.metrics"),
        ),
    ),
    ("pipeline.evaluate.cli", ("pipeline", "shards")),
    ("pipeline.evaluate", ("pipeline.inference", "pipeline.models", "pipeline.config", "pipeline.errors", "shards")),
)

# The rooms of the data layer, from the top: a room may import the rooms below it, not those beside or above it.
SHARDS_FLOORS: tuple[tuple[str, ...], ...] = (
    ("shards.cli",),
    ("shards.exchange", "shards.inspect"),
    ("shards.build",),
    ("shards.load",),
    ("shards.order", "shards.filter"),
    ("shards.corpora",),
    ("shards.format",),
    ("shards.media", "shards.storage", "shards.text", "shards.names"),
    ("shards.schema", "shards.text_tokens"),
    ("shards.errors", "shards.wording", "shards.terminal", "shards.atomic"),
)

FOR_ALL = ("shards.errors", "shards.terminal", "shards.atomic")
"""Small modules that import nothing of ours."""

# Calls a module may make while it is imported: they build a value and do nothing else.
PURE_CALLS = {
    "logging.getLogger", "re.compile", "frozenset", "tuple", "dict", "dict.fromkeys", "list", "set", "range",
    "sorted", "len", "max", "Path", "TypeVar", "ParamSpec", "MappingProxyType", "types.MappingProxyType",
    "namedtuple", "np.dtype", "struct.Struct", "struct.calcsize", "field", "dataclasses.field", "Field",
    "ConfigDict", "PrivateAttr", "typer.Typer", "typer.Option", "typer.Argument", "pa.schema", "pa.field",
    "Decimal", "float", "int", "str", "functools.partial", "operator.attrgetter", "operator.itemgetter",
}  # fmt: skip
# Constant tables that are computed rather than typed: module -> function.
COMPUTED_TABLES = {"shards.corpora.synthetic_grammar": "_lexicon", "pipeline.models.attention.ragged": "_flash"}
PURE_METHODS = {"items", "keys", "values", "split", "join", "format", "with_name", "resolve", "union"}
# Statements that are nothing but a call, and the files in which they may stand.
REGISTRATIONS = {
    "add_implicit_resolver": ("pipeline.config.source",),
    "register": ("pipeline.models", "pipeline.models.attention"),
    "register_evaluate": ("launch.slt",),
    "register_experiment": ("launch.slt",),
    "add_typer": ("launch.slt", "shards.cli.app", "launch.cli"),
    "command": ("launch.slt", "launch.checkpoints_cli", "shards.cli.app", "launch.cli"),
}


def assert_none(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


# -- sizes -----------------------------------------------------------------------------------------------------------
def test_files_are_short() -> None:
    lengths = {source.path: source.text.count("\n") for source in sources(*EVERYTHING)}
    assert_none([f"{path}: {n} lines, at most {MAX_FILE_LINES}" for path, n in lengths.items() if n > MAX_FILE_LINES])


def test_functions_are_short() -> None:
    assert_none(
        [
            f"{source.path}:{node.lineno}: {node.name} has {_lines(node)} lines, at most {MAX_FUNCTION_LINES}"
            for source in sources(*EVERYTHING)
            for node in source.functions()
            if _lines(node) > MAX_FUNCTION_LINES
        ]
    )


def test_functions_take_few_parameters() -> None:
    """``self``, ``cls``, ``*args`` and ``**kwargs`` are free; tests may take as many fixtures as they like."""
    assert_none(
        [
            f"{source.path}:{node.lineno}: {node.name} takes {_parameters(node)} parameters, at most {MAX_PARAMETERS}"
            for source in sources(*LIBRARY, "benchmarks")
            for node in source.functions()
            if _parameters(node) > MAX_PARAMETERS
        ]
    )


def test_the_trainer_loop_reads_on_one_screen() -> None:
    """The step loop, and any other loop of the trainer, from its ``for`` to its last line."""
    loops = [
        node
        for source in sources("pipeline")
        if source.path == "pipeline/engine/trainer.py"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.For | ast.While)
    ]
    assert_none(
        [f"trainer.py:{n.lineno}: loop of {_lines(n)} lines" for n in loops if _lines(n) > MAX_TRAINER_LOOP_LINES]
    )


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _parameters(node: FunctionNode) -> int:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


# -- imports ---------------------------------------------------------------------------------------------------------
def test_import_directions() -> None:
    problems = []
    for source in sources(*LIBRARY, "ds_configs"):
        rule = next((rule for rule in IMPORT_RULES if within(source.module, rule[0])), None)
        if rule is None:
            continue
        package, allowed = rule
        for line, module in _own_imports(source):
            if not within(module, package, *allowed) and (module not in FOR_ALL or package == "ds_configs"):
                problems.append(f"{source.path}:{line}: {package} may not import {module}")
    assert_none(problems)


def test_rooms_of_the_data_layer_import_downwards() -> None:
    floors = {room: floor for floor, rooms in enumerate(SHARDS_FLOORS) for room in rooms}
    problems = []
    for source in sources("shards"):
        if source.module == "shards":
            continue
        room = ".".join(source.module.split(".")[:2])
        assert room in floors, f"{source.path}: no floor of SHARDS_FLOORS holds {room}"
        for line, module in _own_imports(source):
            other = ".".join(module.split(".")[:2])
            if other not in (room, "shards") and floors[other] <= floors[room]:
                problems.append(f"{source.path}:{line}: {room} may not import {other}, which does not stand below it")
    assert_none(problems)


def test_no_two_modules_import_each_other() -> None:
    """At any distance, imports inside functions included."""
    graph = {s.module: {m for _, m in _own_imports(s) if m != s.module} for s in sources(*LIBRARY, "ds_configs")}
    circles = []
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circles.append(f"imported in a circle: {' <- '.join(error.args[1])}")
    assert_none(circles)


def _own_imports(source: Source) -> Iterator[tuple[int, str]]:
    """Imports of this repository's modules; ``from pipeline import errors`` counts as ``pipeline.errors``."""
    modules = {s.module for s in sources(*LIBRARY, "ds_configs")}
    packages = {s.module for s in sources(*LIBRARY, "ds_configs") if s.path.endswith("__init__.py")}
    for line, module in imported_modules(source):
        if module in modules and not (module in packages and _imports_from_inside(source, line, modules)):
            yield line, module


def _imports_from_inside(source: Source, line: int, modules: set[str]) -> bool:
    """Whether the import on this line names modules of the package, not the package itself."""
    names = [module for number, module in imported_modules(source) if number == line]
    return any(name in modules for name in names if name != names[0])


def test_distributed_code_lives_in_two_places() -> None:
    problems = []
    for source in sources(*LIBRARY):
        if within(source.module, *DISTRIBUTED_CODE):
            continue
        imported = [(line, m) for line, m in imported_modules(source) if within(m, *DISTRIBUTED_PACKAGES)]
        names = [n for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)]
        used = [(n.lineno, "torch.distributed") for n in names if dotted(n) == "torch.distributed"]
        problems += [f"{source.path}:{line}: {name} outside {DISTRIBUTED_CODE}" for line, name in imported + used]
    assert_none(problems)


def test_the_data_layer_needs_no_torch_outside_the_loader() -> None:
    assert_none(
        [
            f"{source.path}:{line}: imports {module}"
            for source in sources("shards")
            if source.module not in TORCH_IN_SHARDS
            for line, module in imported_modules(source)
            if within(module, "torch")
        ]
    )


def test_the_environment_is_read_in_two_places() -> None:
    assert_none(
        [
            f"{source.path}:{node.lineno}: {_environment_use(node)}; pass the value in"
            for source in sources(*LIBRARY)
            if not within(source.module, *ENVIRONMENT_CODE)
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Attribute | ast.ImportFrom) and _environment_use(node)
        ]
    )


def _environment_use(node: ast.AST) -> str:
    name = dotted(node)
    if name in ("os.environ", "os.getenv", "os.putenv", "os.environb"):
        return name
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        return next((f"from os import {a.name}" for a in node.names if a.name in ("environ", "getenv", "putenv")), "")
    return ""


def test_launch_config_and_cli_start_without_torch() -> None:
    """Login nodes plan and check recipes; importing torch there costs seconds and may fail outright."""
    light = [
        source.module
        for source in sources(*LIBRARY)
        if within(source.module, "launch", "pipeline.config") and source.module != "launch.train"
    ]
    program = (
        f"import sys, {', '.join(light)}; heavy = {{'torch', 'deepspeed', 'transformers'}} & set(sys.modules); "
        "sys.exit(f'imported on the way: {sorted(heavy)}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


# -- side effects ----------------------------------------------------------------------------------------------------
def test_no_work_at_import_time() -> None:
    problems = []
    for source in sources(*LIBRARY):
        for statement in _import_time_statements(source.tree.body):
            problems += [f"{source.path}:{line}: {what}" for line, what in _work(source, statement)]
    assert_none(problems)


def _import_time_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, class bodies included, function bodies not."""
    for node in body:
        if isinstance(node, ast.If):
            if dotted(getattr(node.test, "left", node.test)) != "__name__":
                yield from _import_time_statements(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from _import_time_statements(node.body + node.orelse + node.finalbody)
        elif isinstance(node, ast.ClassDef):
            yield from _import_time_statements(node.body)
        elif not isinstance(node, FunctionNode | ast.Import | ast.ImportFrom | ast.Pass):
            yield node


def _work(source: Source, statement: ast.stmt) -> Iterator[tuple[int, str]]:
    if isinstance(statement, ast.For | ast.While | ast.With | ast.Delete):
        yield statement.lineno, f"{type(statement).__name__.lower()} at import time"
        return
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        verb = _called(statement.value).rpartition(".")[2]
        if source.module not in REGISTRATIONS.get(verb, ()):
            yield statement.lineno, f"calls {_called(statement.value)}() at import time"
        return
    for call in _calls(statement):
        name = _called(call)
        last = name.rpartition(".")[2]
        pure = name in PURE_CALLS or last in PURE_METHODS or within(name, "math")
        if not pure and last not in _our_classes() and COMPUTED_TABLES.get(source.module) != name:
            yield call.lineno, f"calls {name}() at import time"


def _called(call: ast.Call) -> str:
    """Name of what is called; ``app.command("x")(f)`` is ``app.command``."""
    function: ast.expr = call.func
    while isinstance(function, ast.Call):
        function = function.func
    return dotted(function) or ast.unparse(function)


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    """Calls made when the node runs; lambdas wait until they are called."""
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _calls(child)


@functools.cache
def _our_classes() -> frozenset[str]:
    """Our own classes are plain values until a method is called; building one is no work."""
    return frozenset(n.name for s in sources(*LIBRARY) for n in ast.walk(s.tree) if isinstance(n, ast.ClassDef))


def test_no_reassigned_module_globals() -> None:
    assert_none(
        [
            f"{source.path}:{node.lineno}: global {', '.join(node.names)}"
            for source in sources(*LIBRARY)
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Global)
        ]
    )


def test_libraries_do_not_print() -> None:
    assert_none(
        [
            f"{source.path}:{node.lineno}: print(); libraries log, the CLI uses rich"
            for source in sources(*LIBRARY)
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Call) and dotted(node.func) == "print"
        ]
    )


def test_no_drawer_modules() -> None:
    drawers = ("utils.py", "util.py", "helpers.py", "misc.py")
    assert_none([f"{s.path}: name it after what it does" for s in sources(*EVERYTHING) if s.path.endswith(drawers)])


def test_test_folders_are_packages() -> None:
    """Equal file names in different folders (test_plan.py) collide otherwise, and spawned ranks cannot find them."""
    folders = {(ROOT / s.path).parent for s in sources("tests")}
    assert_none([f"{folder.relative_to(ROOT)}/__init__.py is missing" for folder in folders if not _is_package(folder)])


def _is_package(folder: object) -> bool:
    return (ROOT / str(folder) / "__init__.py").exists()
