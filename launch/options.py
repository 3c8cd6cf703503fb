"""Options shared by `slt launch plan` and `slt launch run`, and how they become a `LaunchPlan`."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import socket
import typing
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.backends import deepspeed as deepspeed_backend
from launch.hostfile import Host, filter_hosts, read_hostfile
from launch.plan import LaunchPlan, plan_ranks, threads_per_rank
from pipeline.config.load import PROJECT_ROOT, find_recipe, load
from pipeline.config.resolve import ResolvedRecipe, resolve_file
from pipeline.errors import RecipeError

TRAIN_SCRIPT = PROJECT_ROOT / "launch" / "train.py"
DEFAULT_PORT = 29500
_NUM_PROCS = "Ranks on this machine (default: the recipe's first world size)."
_MASTER_PORT = "Default: a free port, 29500 with a hostfile."

# Variables that must be the same on every host and that ssh does not carry.
_CARRIED = (
    "NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "HF_HOME", "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE", "DEEPSPEED_TIMEOUT", "OMP_NUM_THREADS", "DS_ACCELERATOR",
)  # fmt: skip
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY", re.IGNORECASE)
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dri/renderD128")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """The command line of a launch."""

    recipe: Annotated[str, typer.Argument(help="Recipe file, resolved recipe, or name of a built-in recipe.")]
    num_procs: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine (default: the recipe's first world size).")
    ] = None
    hostfile: Annotated[Path | None, typer.Option(help="Hosts to run on, one `name slots=N` per line.")] = None
    include: Annotated[str, typer.Option(help="Of the hostfile, only NAME:DEVICE,...@NAME...")] = ""
    exclude: Annotated[str, typer.Option(help="Of the hostfile, all but NAME:DEVICE,...@NAME...")] = ""
    backend: Annotated[str | None, typer.Option(help="Default: deepspeed with --hostfile, else local.")] = None
    sets: Annotated[list[str] | None, typer.Option("--set", help="a.b=value, value in YAML; may be repeated.")] = None
    run_dir: Annotated[str | None, typer.Option(help="Short for --set run_dir=...")] = None
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto"
    master_addr: Annotated[str | None, typer.Option(help="Where ranks meet (default: the first host).")] = None
    master_port: Annotated[int | None, typer.Option(min=1, max=65535, help=_MASTER_PORT)] = None
    ssh_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of sshd on the hosts.")] = None
    export: Annotated[list[str] | None, typer.Option(help="NAME or NAME=VALUE for all ranks; may be repeated.")] = None


def with_options(cls: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a typer command the fields of a dataclass as options; the command receives one object as first argument."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(cls, include_extras=True)
        own = typing.get_type_hints(function, include_extras=True)
        own_parameters = list(inspect.signature(function).parameters.values())[1:]
        parameters = [
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if item.default is dataclasses.MISSING else item.default,
                annotation=hints[item.name],
            )
            for item in dataclasses.fields(cls)
        ]
        parameters += [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own[parameter.name])
            for parameter in own_parameters
        ]

        def command(**values: Any) -> None:
            rest = {parameter.name: values.pop(parameter.name) for parameter in own_parameters}
            function(cls(**values), **rest)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def build_plan(options: LaunchOptions, environ: Mapping[str, str]) -> tuple[LaunchPlan, ResolvedRecipe]:
    """Check hosts, devices and recipe together; nothing is started.

    Raises:
        RecipeError: the recipe cannot run on that many ranks, or the options contradict each other.
    """
    recipe = find_recipe(options.recipe)
    sets = [*(options.sets or []), *([f"run_dir={options.run_dir}"] if options.run_dir else [])]
    hosts, visible = _hosts(options, environ, lambda: _first_world_size(recipe, sets))
    resolved = resolve_file(recipe, sum(host.slots for host in hosts), sets)
    local = options.hostfile is None
    master_addr = options.master_addr or ("127.0.0.1" if local else hosts[0].name)
    master_port = options.master_port or (free_port() if local else DEFAULT_PORT)
    plan = LaunchPlan(
        script=TRAIN_SCRIPT,
        arguments=(str(recipe), *(part for text in sets for part in ("--set", text))),
        run_dir=Path(resolved.recipe.run_dir),
        hosts=hosts,
        ranks=plan_ranks(hosts, master_addr, master_port),
        launch_id=uuid.uuid4().hex[:12],
        env=_environment(options, environ, hosts),
        hostfile=options.hostfile,
        ssh_port=options.ssh_port,
        visible_devices=visible,
    )
    return plan, resolved


def free_port() -> int:
    """A TCP port that was free on this machine a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_world_size(recipe: Path, sets: list[str]) -> int:
    loaded = load(recipe, sets)
    recorded = (loaded.recorded or {}).get("world_size")
    return recorded if isinstance(recorded, int) else loaded.recipe.train.world_sizes[0]


def _hosts(
    options: LaunchOptions, environ: Mapping[str, str], default_procs: Callable[[], int]
) -> tuple[tuple[Host, ...], bool]:
    """The hosts to run on, and whether their devices come from CUDA_VISIBLE_DEVICES."""
    if options.hostfile is not None:
        if options.num_procs is not None:
            raise RecipeError("--num-procs and --hostfile cannot be combined; the hostfile says slots=N per host")
        return filter_hosts(read_hostfile(options.hostfile), options.include, options.exclude), False
    if options.include or options.exclude:
        raise RecipeError("--include and --exclude select from a hostfile; add --hostfile")
    count = options.num_procs or default_procs()
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not visible or _accelerator(options, environ) == "cpu":
        return (Host("localhost", tuple(range(count))),), False
    names = [name.strip() for name in visible.split(",")]
    if not all(name.isdigit() for name in names):
        raise RecipeError(
            f"CUDA_VISIBLE_DEVICES={visible} names devices by UUID, which DeepSpeed's launcher cannot pass on;"
            " use device numbers"
        )
    if len(names) < count:
        raise RecipeError(f"{count} ranks need {count} devices, but CUDA_VISIBLE_DEVICES={visible} shows {len(names)}")
    return (Host("localhost", tuple(int(name) for name in names[:count])),), True


def _accelerator(options: LaunchOptions, environ: Mapping[str, str]) -> str:
    """``cpu``, ``gpu`` or, for hosts that are not looked at, ``unknown``."""
    if options.accelerator not in ("auto", "cpu", "gpu"):
        raise RecipeError(f"--accelerator must be auto, cpu or gpu, got {options.accelerator}")
    if options.accelerator != "auto":
        return options.accelerator
    if environ.get("DS_ACCELERATOR"):
        return "cpu" if environ["DS_ACCELERATOR"] == "cpu" else "gpu"
    if options.hostfile is not None:
        return "unknown"
    return "gpu" if any(Path(device).exists() for device in _GPU_DEVICES) else "cpu"


def _environment(options: LaunchOptions, environ: Mapping[str, str], hosts: tuple[Host, ...]) -> dict[str, str]:
    """Variables for every rank: what it takes to run at all, what must agree between hosts, what the user exports."""
    accelerator = _accelerator(options, environ)
    env = {key: value for key, value in environ.items() if key.startswith(_CARRIED)} if options.hostfile else {}
    if accelerator == "cpu":
        env["DS_ACCELERATOR"] = "cpu"
    if "OMP_NUM_THREADS" not in environ:
        cores = len(os.sched_getaffinity(0))
        env["OMP_NUM_THREADS"] = str(threads_per_rank(cores, max(host.slots for host in hosts)))
    env["PYTHONPATH"] = os.pathsep.join(part for part in (str(PROJECT_ROOT), environ.get("PYTHONPATH", "")) if part)
    if options.hostfile is not None and not _is_single_local(hosts):
        env = {**deepspeed_env_files(), **env}
    for text in options.export or []:
        name, equals, value = text.partition("=")
        if _SECRET.search(name):
            raise RecipeError(f"--export {name}: exported values show in process lists; log in on every host instead")
        if not equals and name not in environ:
            raise RecipeError(f"--export {name}: the variable is not set here; write --export {name}=VALUE")
        env[name] = value if equals else environ[name]
    return env


def _is_single_local(hosts: tuple[Host, ...]) -> bool:
    return len(hosts) == 1 and deepspeed_backend.is_this_machine(hosts[0].name)


def deepspeed_env_files() -> dict[str, str]:
    """Variables of ``~/.deepspeed_env`` and ``./.deepspeed_env``, which the launch's own file would hide."""
    found: dict[str, str] = {}
    for folder in (Path.home(), Path.cwd()):
        path = folder / ".deepspeed_env"
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            key, equals, value = line.strip().partition("=")
            if not line.strip():
                continue
            if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                raise RecipeError(f"{path}:{number}: {line!r} is not of the form NAME=VALUE")
            found[key] = value
    return found


__all__ = ["LaunchOptions", "build_plan", "deepspeed_env_files", "free_port", "with_options"]
