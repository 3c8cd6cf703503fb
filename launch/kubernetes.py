"""A launch as a PyTorchJob (kubeflow.org/v1) of Kubernetes: one pod per node, each of which runs the launch itself."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import RecipeError

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LONGEST_NAME = 50  # the operator makes pod and service names of it: NAME-worker-12
# A pod waits for its launch, also when a signal ends `wait`. Of a replica's exit codes, those from 128 on start it
# again: so do a saved run (75) and a lost host (3), unless a user asked for the end.
_SCRIPT = """{launch} &
launch=$!
trap 'kill -TERM "$launch"' TERM INT
wait "$launch"; code=$?
while kill -0 "$launch" 2>/dev/null; do wait "$launch"; code=$?; done
if [ ! -e {stop} ]; then case "$code" in 3|75) exit 143;; esac; fi
exit "$code"
"""
_HEADER = """# Written by `slt launch manifest --kind kubernetes`; needs Kubeflow's training operator, v1.
# Start it: kubectl apply -f FILE    Follow it: kubectl logs -f {name}-master-0    End it: kubectl delete -f FILE
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodJob:
    """What a job needs of the cluster, and what each of its pods runs."""

    name: str
    namespace: str | None
    image: str
    nodes: int
    gpus: int
    """Of every pod."""
    cpus: int | None
    memory: str | None
    shm_gib: int
    volumes: tuple[tuple[str, str], ...]
    """PersistentVolumeClaim and the folder where it appears."""
    grace_seconds: int
    """For the ranks to save."""
    env: dict[str, str]
    run_dir: Path
    command: tuple[str, ...]
    """Without the number of the pod."""


def pytorch_job(job: PodJob) -> str:
    """The manifest, in YAML."""
    replicas = {"Master": _replica(job, 1)}
    if job.nodes > 1:
        replicas["Worker"] = _replica(job, job.nodes - 1)
    document = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job.name, **({"namespace": job.namespace} if job.namespace else {})},
        # pods of a job that has ended stay, with their logs
        "spec": {"runPolicy": {"cleanPodPolicy": "None"}, "pytorchReplicaSpecs": replicas},
    }
    return _HEADER.format(name=job.name) + yaml.safe_dump(document, sort_keys=False, width=120)


def _replica(job: PodJob, count: int) -> dict[str, Any]:
    amounts = {"nvidia.com/gpu": job.gpus or None, "cpu": job.cpus, "memory": job.memory}
    resources = {name: str(amount) for name, amount in amounts.items() if amount is not None}
    volumes: list[dict[str, Any]] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{job.shm_gib}Gi"}},
        *({"name": f"volume-{n}", "persistentVolumeClaim": {"claimName": c}} for n, (c, _) in enumerate(job.volumes)),
    ]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    mounts += [{"name": f"volume-{number}", "mountPath": folder} for number, (_, folder) in enumerate(job.volumes)]
    container = {
        "name": "pytorch",  # the operator looks for this name
        "image": job.image,
        "command": ["sh", "-c", _script(job)],
        "env": [{"name": name, "value": value} for name, value in job.env.items()],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    pod = {
        "containers": [container],
        "volumes": volumes,
        "securityContext": {"runAsNonRoot": True},
        "terminationGracePeriodSeconds": job.grace_seconds + 30,
    }
    # a service mesh would put a proxy between the ranks
    annotations = {"sidecar.istio.io/inject": "false"}
    template = {"metadata": {"annotations": annotations}, "spec": pod}
    return {"replicas": count, "restartPolicy": "ExitCode", "template": template}


def _script(job: PodJob) -> str:
    number = ' --node-rank "$RANK"' if job.nodes > 1 else ""
    text = _SCRIPT.format(launch=shlex.join(job.command) + number, stop=shlex.quote(str(job.run_dir / "stop.json")))
    return text.replace("$(", "$$(")  # Kubernetes would expand it


def job_name(text: str) -> str:
    """A recipe's name as Kubernetes takes it. Raises RecipeError when it cannot be made one."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not _LABEL.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise RecipeError(
            f"{text!r} makes no name of a Kubernetes job (at most {_LONGEST_NAME} of a-z, 0-9, -): --name"
        )
    return name


def volume(text: str) -> tuple[str, str]:
    """``CLAIM:/folder`` -> claim, folder."""
    claim, _, folder = text.partition(":")
    if not _LABEL.fullmatch(claim) or not folder.startswith("/"):
        raise RecipeError(f"--volume {text}: write CLAIM:/folder, a PersistentVolumeClaim and where it appears")
    return claim, folder


__all__ = ["PodJob", "job_name", "pytorch_job", "volume"]
