"""Options of `slt launch plan` and `slt launch run`, and the `LaunchPlan` made from them."""

from __future__ import annotations

import dataclasses
import inspect
import os
import socket
import typing
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.backends import deepspeed as deepspeed_backend
from launch.devices import VARIABLE, listed_devices, visible_devices
from launch.hostfile import Host, filter_hosts, read_hostfile
from launch.plan import LaunchPlan, plan_ranks, threads_per_rank
from launch.slurm import Allocation, read_allocation
from launch.variables import carried, deepspeed_env_files, exported, python_path, search_paths
from pipeline.config.gpu_memory import GPU_MEMORY, gpu_gib
from pipeline.config.load import PROJECT_ROOT, LoadedRecipe, load
from pipeline.config.preflight import check_recipe, load_with_inputs
from pipeline.config.recipe_file import recipe_file
from pipeline.config.resolve import ResolvedRecipe, resolve_loaded
from pipeline.config.source import as_value
from pipeline.errors import RecipeError

TRAIN_SCRIPT = PROJECT_ROOT / "launch" / "train.py"
DEFAULT_PORT = 29500
_NUM_PROCS = "Ranks on this machine (default: the recipe's first world size); with slurm and torchrun, on every node."
_MASTER_PORT = "Default: a free port; 29500 with a hostfile, made from the job's number with slurm."
_NO_SSH = "With --hostfile: start only this host's ranks (--node-rank); every host runs this command."
RENDEZVOUS_ID = "slt"
_NODE_RANK = "This host's number, where every host runs this command; 0 leads (torchrun: the host of --rdzv-endpoint)."
_MAX_REQUEUES = "In a SLURM batch job that stops and saves: put it back into the queue, at most this often."
_BACKEND = "local, deepspeed, slurm or torchrun (default: deepspeed with --hostfile, else local)."


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """The command line of a launch."""

    recipe: Annotated[str, typer.Argument(help="Recipe file, resolved recipe, or name of a built-in recipe.")]
    num_procs: Annotated[int | None, typer.Option(min=1, help=_NUM_PROCS)] = None
    hostfile: Annotated[Path | None, typer.Option(help="Hosts to run on, one `name slots=N` per line.")] = None
    include: Annotated[str, typer.Option(help="Of the hostfile, only NAME:DEVICE,...@NAME...")] = ""
    exclude: Annotated[str, typer.Option(help="Of the hostfile, all but NAME:DEVICE,...@NAME...")] = ""
    backend: Annotated[str | None, typer.Option(help=_BACKEND)] = None
    sets: Annotated[list[str] | None, typer.Option("--set", help="a.b=value, value in YAML; may be repeated.")] = None
    run_dir: Annotated[str | None, typer.Option(help="Short for --set run_dir=...")] = None
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto"
    gpu_memory: Annotated[str | None, typer.Option(help=GPU_MEMORY)] = None
    master_addr: Annotated[str | None, typer.Option(help="Where ranks meet (default: the first host).")] = None
    master_port: Annotated[int | None, typer.Option(min=1, max=65535, help=_MASTER_PORT)] = None
    ssh_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of sshd on the hosts.")] = None
    export: Annotated[list[str] | None, typer.Option(help="NAME or NAME=VALUE for all ranks; may be repeated.")] = None
    no_ssh: Annotated[bool, typer.Option("--no-ssh", help=_NO_SSH)] = False
    nnodes: Annotated[int, typer.Option(min=1, help="With torchrun: hosts, each of which runs this command.")] = 1
    node_rank: Annotated[int | None, typer.Option(min=0, help=_NODE_RANK)] = None
    rdzv_endpoint: Annotated[str | None, typer.Option(help="With torchrun: HOST:PORT where the hosts meet.")] = None
    rdzv_id: Annotated[str, typer.Option(help="With torchrun: name of the meeting, the same on all hosts.")] = (
        RENDEZVOUS_ID
    )
    max_requeues: Annotated[int, typer.Option(min=0, help=_MAX_REQUEUES)] = 100


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


def load_for(options: LaunchOptions, inputs: bool = False) -> LoadedRecipe:
    """The recipe of the options; with ``inputs`` also what it needs here is checked."""
    return (load_with_inputs if inputs else load)(options.recipe, _sets(options))


def planned_hosts(options: LaunchOptions, environ: Mapping[str, str], loaded: LoadedRecipe) -> tuple[Host, ...]:
    """The hosts that a plan would have now, whether or not the recipe can run on all of them."""
    job = read_allocation(environ) if options.backend == "slurm" else None
    return _hosts(options, environ, loaded, (_accelerator(options, environ, job), job))


def build_plan(
    options: LaunchOptions,
    environ: Mapping[str, str],
    inputs: bool = False,
    job: Allocation | None = None,
    loaded: LoadedRecipe | None = None,
) -> tuple[LaunchPlan, ResolvedRecipe]:
    """Check hosts, devices and recipe together, with ``inputs`` also what the recipe needs here; nothing is started.

    With ``job``, the plan is for that SLURM job, in which this process need not run; with ``loaded``, for the recipe
    as it was when somebody read it.

    Raises:
        RecipeError: the recipe cannot run on that many ranks, options contradict each other, or an input is missing.
    """
    _refuse_unused(options)
    loaded = loaded or load_for(options, inputs)
    if job is None and options.backend == "slurm":
        job = read_allocation(environ)
    accelerator = _accelerator(options, environ, job)
    hosts = _hosts(options, environ, loaded, (accelerator, job))
    world_size = sum(host.slots for host in hosts)
    if inputs:
        check_recipe(loaded, [world_size])
    resolved = resolve_loaded(loaded, world_size, _sets(options))
    needs_gpus = accelerator == "gpu" or (accelerator == "unknown" and _is_for_gpus(loaded))
    local = options.hostfile is None and job is None
    node_rank, rendezvous = _meeting(options, len(hosts))
    if rendezvous is not None:
        address, _, port = rendezvous[0].rpartition(":")
        meet = (address, int(port))
    else:
        default_port = job.port if job is not None else free_port() if local else DEFAULT_PORT
        address = options.master_addr or ("127.0.0.1" if local else hosts[0].name)
        meet = (address, options.master_port or default_port)
    run_dir = Path(resolved.recipe.run_dir)
    file = recipe_file(resolved, run_dir.absolute())  # a name that begins with a dash would be an option to the rank
    plan = LaunchPlan(
        script=TRAIN_SCRIPT,
        arguments=(str(file.path), "--sha256", file.sha256),
        run_dir=run_dir,
        hosts=hosts,
        ranks=plan_ranks(hosts, *meet),
        launch_id=uuid.uuid4().hex[:12],
        env=_environment(options, environ, (hosts, job), "gpu" if needs_gpus else accelerator),
        hostfile=options.hostfile,
        ssh_port=options.ssh_port,
        accelerator=accelerator,
        needs_gpus=needs_gpus,
        node_rank=node_rank,
        rendezvous=rendezvous,
        cpus_per_rank=0 if job is None else job.cpus_per_node // hosts[0].slots,
    )
    return plan, resolved


def _refuse_unused(options: LaunchOptions) -> None:
    """Options that the backend would not read."""
    if options.hostfile is not None and options.backend in ("local", "torchrun"):
        raise RecipeError(
            f"--backend {options.backend} starts ranks on this machine and does not read --hostfile; for hosts with "
            "ssh leave out --backend, for torchrun say --nnodes and --num-procs on every host"
        )
    if options.ssh_port is not None and (options.hostfile is None or options.no_ssh):
        raise RecipeError("--ssh-port is that of the hosts of a --hostfile; without ssh leave it out")
    if options.nnodes > 1 and (options.master_addr is not None or options.master_port is not None):
        raise RecipeError("--master-addr and --master-port are not read with --nnodes; ranks meet by --rdzv-endpoint")


def _meeting(options: LaunchOptions, hosts: int) -> tuple[int | None, tuple[str, str] | None]:
    """Where every host has a launcher: the number of this host, and with torchrun the rendezvous."""
    torchrun = options.backend == "torchrun"
    if options.no_ssh and (options.hostfile is None or options.node_rank is None or torchrun):
        raise RecipeError("--no-ssh goes with --hostfile and this host's --node-rank; it has no meaning for torchrun")
    if not torchrun and (options.nnodes > 1 or options.rdzv_endpoint is not None):
        raise RecipeError("--nnodes and --rdzv-endpoint belong to --backend torchrun; other backends use --hostfile")
    if options.nnodes == 1 and (options.rdzv_endpoint is not None or options.rdzv_id != RENDEZVOUS_ID):
        raise RecipeError("--rdzv-endpoint and --rdzv-id are read with --nnodes 2 or more; one host meets nobody")
    if options.no_ssh or (torchrun and options.nnodes > 1):
        number = options.node_rank
        if torchrun:
            address, colon, port = (options.rdzv_endpoint or "").rpartition(":")
            if not colon or not port.isdecimal():
                raise RecipeError(
                    "--nnodes needs --rdzv-endpoint HOST:PORT, a host of the run, the same on all of them"
                )
            number = (0 if is_local(address) else 1) if number is None else number
        assert number is not None
        if number >= hosts:
            raise RecipeError(f"--node-rank {number}: there are {hosts} hosts, numbered from 0")
        return number, (str(options.rdzv_endpoint), options.rdzv_id) if torchrun else None
    if options.node_rank is not None:
        raise RecipeError("--node-rank belongs to --no-ssh or to --nnodes; this command starts the ranks of all hosts")
    return None, None


def is_local(address: str) -> bool:
    """Whether a name or address is this machine's own."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _sets(options: LaunchOptions) -> list[str]:
    """`--set` and the options that are short for one."""
    sets = list(options.sets or [])
    if options.run_dir:
        sets.append(f"run_dir={as_value(options.run_dir)}")
    if options.gpu_memory is not None:
        sets.append(f"deepspeed.gpu_memory_gib={gpu_gib(options.gpu_memory)}")
    return sets


def free_port() -> int:
    """A TCP port that was free on this machine a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_world_size(loaded: LoadedRecipe) -> int:
    recorded = (loaded.recorded or {}).get("world_size")
    return recorded if isinstance(recorded, int) else loaded.recipe.train.world_sizes[0]


def _hosts(
    options: LaunchOptions,
    environ: Mapping[str, str],
    loaded: LoadedRecipe,
    where: tuple[str, Allocation | None],
) -> tuple[Host, ...]:
    """The hosts to run on; this machine has the devices that its ranks need."""
    accelerator, job = where
    asked_for_cpus = options.accelerator != "auto" or bool(environ.get("DS_ACCELERATOR"))
    if job is not None:
        if options.hostfile is not None:
            raise RecipeError("--backend slurm takes its hosts from the allocation; leave out --hostfile")
        if accelerator == "cpu" and _is_for_gpus(loaded) and not asked_for_cpus:
            raise RecipeError(
                f"a recipe for GPUs (deepspeed.base={loaded.recipe.deepspeed.base}), but {job} has "
                "none; submit it with --gpus-per-node=N, or use the CPU with --accelerator cpu"
            )
        return filter_hosts(job.hosts(options.num_procs, accelerator == "gpu"), options.include, options.exclude)
    if options.hostfile is not None:
        if options.num_procs is not None:
            raise RecipeError("--num-procs and --hostfile cannot be combined; the hostfile says slots=N per host")
        return filter_hosts(read_hostfile(options.hostfile), options.include, options.exclude)
    if options.include or options.exclude:
        raise RecipeError("--include and --exclude select from a hostfile; add --hostfile")
    if options.nnodes > 1 and options.num_procs is None:
        raise RecipeError("--nnodes needs --num-procs, the ranks of every host")
    count = options.num_procs or _first_world_size(loaded)
    names = ["localhost"] if options.nnodes == 1 else [f"node-{number}" for number in range(options.nnodes)]
    demand = f"{count} ranks" if options.num_procs else f"{count} ranks (the recipe's first world size)"
    if accelerator == "gpu":
        devices = _gpus(count, demand, environ)
        return tuple(Host(name, devices) for name in names)
    if not asked_for_cpus and _is_for_gpus(loaded):
        raise RecipeError(
            f"{demand} of a recipe for GPUs (deepspeed.base={loaded.recipe.deepspeed.base}), but {_shown(environ, 0)};"
            " name machines that have some with --hostfile, or use the CPU with --accelerator cpu"
        )
    cores = len(os.sched_getaffinity(0))
    if options.num_procs is None and count > cores:
        raise RecipeError(
            f"{demand} are more than the {cores} processor cores of this machine; say how many to start: --num-procs N"
        )
    return tuple(Host(name, tuple(range(count))) for name in names)


def _gpus(count: int, demand: str, environ: Mapping[str, str]) -> tuple[int | str, ...]:
    """The first ``count`` devices that this environment may use. Raises RecipeError when there are fewer."""
    names = visible_devices(environ, listed_devices())
    if len(names) < count:
        fewer = f"; start fewer with --num-procs {len(names)}, or name more machines with --hostfile" if names else ""
        raise RecipeError(f"{demand} need {count} devices, but {_shown(environ, len(names))}{fewer}")
    return names[:count]


def _shown(environ: Mapping[str, str], count: int) -> str:
    who = f"{VARIABLE}={environ[VARIABLE]}" if VARIABLE in environ else "this machine"
    return f"{who} shows {count or 'no GPU'}"


def _is_for_gpus(loaded: LoadedRecipe) -> bool:
    return loaded.recipe.deepspeed.base != "cpu"


def _accelerator(options: LaunchOptions, environ: Mapping[str, str], job: Allocation | None) -> str:
    """``cpu``, ``gpu``, or ``unknown`` for hosts that are not checked."""
    if options.accelerator not in ("auto", "cpu", "gpu"):
        raise RecipeError(f"--accelerator must be auto, cpu or gpu, got {options.accelerator}")
    if options.accelerator != "auto":
        return options.accelerator
    if environ.get("DS_ACCELERATOR"):
        return "cpu" if environ["DS_ACCELERATOR"] == "cpu" else "gpu"
    if job is not None:
        return "gpu" if job.gpus_per_node else "cpu"
    if options.hostfile is not None:
        return "unknown"
    listed = listed_devices()
    return "gpu" if listed and visible_devices(environ, listed) else "cpu"


def _environment(
    options: LaunchOptions,
    environ: Mapping[str, str],
    where: tuple[tuple[Host, ...], Allocation | None],
    accelerator: str,
) -> dict[str, str]:
    """Variables for every rank; later ones override earlier ones."""
    hosts, job = where
    env: dict[str, str] = {}
    if options.hostfile is not None and not _is_single_local(hosts):
        env = {**search_paths(environ), **deepspeed_env_files(), **carried(environ)}
    if accelerator == "cpu":
        env["DS_ACCELERATOR"] = "cpu"
    elif accelerator == "gpu" and environ.get("DS_ACCELERATOR", "cpu") in ("", "cpu"):
        env["DS_ACCELERATOR"] = "cuda"  # a rank whose torch finds no GPU must not fall back to the CPU
    if "OMP_NUM_THREADS" not in {**environ, **env}:
        cores = (job and job.cpus_per_node) or len(os.sched_getaffinity(0))
        env["OMP_NUM_THREADS"] = str(threads_per_rank(cores, max(host.slots for host in hosts)))
    env["PYTHONPATH"] = python_path({**env, **environ})
    return {**env, **exported(options.export or [], environ)}


def _is_single_local(hosts: tuple[Host, ...]) -> bool:
    return len(hosts) == 1 and deepspeed_backend.is_this_machine(hosts[0].name)


__all__ = [
    "LaunchOptions",
    "build_plan",
    "deepspeed_env_files",
    "free_port",
    "load_for",
    "planned_hosts",
    "with_options",
]
