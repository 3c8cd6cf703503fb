"""`slt launch manifest`: a PyTorchJob for Kubernetes, a Dockerfile or an Apptainer definition that runs a launch.

It is made from the same plan as a launch, so a recipe that could not run is refused here. Nothing is submitted.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from launch.arguments import arguments_of
from launch.containers import apptainer_definition, dockerfile
from launch.devices import VARIABLE
from launch.kubernetes import PodJob, job_name, pytorch_job, volume
from launch.options import LaunchOptions, build_plan, with_options
from launch.plan import LaunchPlan
from launch.run_options import RunOptions
from launch.slurm import Allocation
from launch.variables import exported
from pipeline.config.names import nearest
from pipeline.errors import RecipeError, StorageError
from shards.atomic import write_atomic

KINDS = ("kubernetes", "docker", "apptainer")
_VOLUME = "CLAIM:/folder of a PersistentVolumeClaim; may be repeated."
_RENDEZVOUS_PORT = 29400
_UNUSED = (
    "hostfile", "ssh_port", "backend", "include", "exclude", "no_ssh", "nnodes", "node_rank", "rdzv_endpoint",
    "rdzv_id", "master_addr", "master_port", "max_requeues",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestOptions(RunOptions):
    """The command line of `slt launch manifest`."""

    kind: Annotated[str, typer.Option(help="kubernetes, docker or apptainer.")]
    nodes: Annotated[int, typer.Option(min=1, help="Pods, each on a node of its own GPUs.")] = 1
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of every pod, one rank each.")] = 0
    image: Annotated[str, typer.Option(help="Container image that holds this project.")] = "llava-slt:latest"
    base_image: Annotated[str, typer.Option(help="Image that a container file begins with.")] = "python:3.11-slim"
    name: Annotated[str | None, typer.Option(help="Of the job (default: the recipe's name).")] = None
    namespace: Annotated[str | None, typer.Option(help="Kubernetes namespace.")] = None
    volume: Annotated[list[str] | None, typer.Option(help=_VOLUME)] = None
    shm_gib: Annotated[int, typer.Option(min=1, help="Shared memory of every pod, for loader workers and NCCL.")] = 16
    cpus: Annotated[int | None, typer.Option(min=1, help="Processor cores of every pod.")] = None
    memory: Annotated[str | None, typer.Option(help="Memory of every pod, such as 200Gi.")] = None
    out: Annotated[Path | None, typer.Option(help="File to write (default: print it).")] = None


@with_options(ManifestOptions)
def manifest_command(options: ManifestOptions) -> None:
    """Write a Kubernetes job or a container file that runs this launch; submit nothing."""
    text = manifest(options)
    if options.out is None:
        sys.stdout.write(text)
        return
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, text)
    except OSError as error:
        raise StorageError(f"{options.out} could not be written: {error.strerror}") from error
    typer.echo(str(options.out))


def manifest(options: ManifestOptions) -> str:
    """The text of the manifest.

    Raises:
        RecipeError: an unknown kind, an option that it cannot use, or a recipe that cannot run on so many ranks.
    """
    if options.kind not in KINDS:
        raise RecipeError(f"--kind {options.kind} is unknown{nearest(options.kind, KINDS)} (known: {', '.join(KINDS)})")
    defaults = {field.name: field.default for field in dataclasses.fields(LaunchOptions)}
    given = [name for name in _UNUSED if getattr(options, name) != defaults[name]]
    if given:
        raise RecipeError(f"--{given[0].replace('_', '-')} has no meaning in a manifest; say --nodes, --gpus-per-node")
    plan, recipe_name = _planned(options)
    if options.kind != "kubernetes":
        if options.nodes > 1:
            raise RecipeError(f"--kind {options.kind} describes one machine; for more, use --kind kubernetes")
        command = ("slt", "launch", "run", options.recipe, "--num-procs", str(plan.world_size), *_settings(options))
        return (dockerfile if options.kind == "docker" else apptainer_definition)(options.base_image, command)
    name = job_name(options.name or recipe_name)
    return pytorch_job(
        PodJob(
            name=name, namespace=options.namespace, image=options.image, nodes=options.nodes,
            gpus=options.gpus_per_node, cpus=options.cpus, memory=options.memory, shm_gib=options.shm_gib,
            volumes=tuple(volume(text) for text in options.volume or []),
            grace_seconds=math.ceil(options.grace_seconds),
            env=exported(options.export or [], os.environ), run_dir=plan.run_dir, command=_in_pod(options, name, plan),
        )
    )  # fmt: skip


def _planned(options: ManifestOptions) -> tuple[LaunchPlan, str]:
    """The plan as it will be there, and the recipe's name. Inputs are not looked for: they are there, not here."""
    nodes = tuple(f"node-{number}" for number in range(options.nodes))
    job = Allocation("", nodes, 1, options.gpus_per_node, options.cpus or 0)
    # which devices this shell may use says nothing about those
    environ = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", VARIABLE)}
    plan, resolved = build_plan(options, environ, job=job)
    return plan, resolved.recipe.name


def _settings(options: ManifestOptions) -> list[str]:
    return [
        *arguments_of(options, ("num_procs", "export", "grace_seconds")),
        "--grace-seconds",
        f"{options.grace_seconds:g}",
    ]


def _in_pod(options: ManifestOptions, name: str, plan: LaunchPlan) -> tuple[str, ...]:
    """The launch of every pod; of several, ``$RANK`` is the pod's number."""
    per_pod = plan.hosts[0].slots
    command = ["slt", "launch", "run", options.recipe, "--num-procs", str(per_pod), *_settings(options)]
    if options.nodes > 1:
        command += ["--backend", "torchrun", "--nnodes", str(options.nodes)]
        command += ["--rdzv-endpoint", f"{name}-master-0:{_RENDEZVOUS_PORT}", "--rdzv-id", name]
    return tuple(command)


__all__ = ["KINDS", "ManifestOptions", "manifest", "manifest_command"]
