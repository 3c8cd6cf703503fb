from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from launch import containers
from launch.cli import app
from launch.containers import PARTS
from launch.manifest import ManifestOptions, manifest
from pipeline.errors import RecipeError, StorageError
from tests.source_tree import ROOT


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
LABEL = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
CLAIM = closed(["claimName"], claimName=TEXT)
VOLUME = {
    "oneOf": [
        closed(["name", "emptyDir"], name=LABEL, emptyDir=closed([], medium={"const": "Memory"}, sizeLimit=QUANTITY)),
        closed(["name", "persistentVolumeClaim"], name=LABEL, persistentVolumeClaim=CLAIM),
    ]
}
CONTAINER = closed(
    ["name", "image", "command"],
    name={"const": "pytorch"}, image=TEXT, command={"type": "array", "items": TEXT},
    env={"type": "array", "items": closed(["name", "value"], name=TEXT, value={"type": "string"})},
    resources=closed([], requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts={"type": "array", "items": closed(["name", "mountPath"], name=LABEL, mountPath=TEXT)},
    securityContext=closed([], allowPrivilegeEscalation={"type": "boolean"}),
)  # fmt: skip
POD = closed(
    ["containers"],
    containers={"type": "array", "minItems": 1, "items": CONTAINER}, volumes={"type": "array", "items": VOLUME},
    securityContext=closed([], runAsNonRoot={"type": "boolean"}), terminationGracePeriodSeconds=COUNT,
)  # fmt: skip
REPLICA = closed(
    ["replicas", "template"],
    replicas=COUNT, restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template=closed(["spec"], metadata=closed([], annotations=TEXTS, labels=TEXTS), spec=POD),
)  # fmt: skip
# The part of the definition of PyTorchJob (kubeflow.org/v1) and of a pod that a manifest of ours may use.
PYTORCH_JOB = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "kubeflow.org/v1"}, kind={"const": "PyTorchJob"},
    metadata=closed(["name"], name=LABEL, namespace=LABEL),
    spec=closed(
        ["pytorchReplicaSpecs"],
        runPolicy=closed([], cleanPodPolicy={"enum": ["All", "Running", "None"]}),
        pytorchReplicaSpecs=closed(["Master"], Master=REPLICA, Worker=REPLICA),
    ),
)  # fmt: skip


def text(**given: Any) -> str:
    values: dict[str, Any] = {"recipe": "phoenix14t_contrastive_8xh100", "kind": "kubernetes", "gpus_per_node": 8}
    return manifest(ManifestOptions(**{**values, **given}))


def job(**given: Any) -> dict[str, Any]:
    document = yaml.safe_load(text(**given))
    jsonschema.validate(document, PYTORCH_JOB)
    return document  # type: ignore[no-any-return]


def test_a_job_of_two_pods() -> None:
    document = job(
        nodes=2, sets=["train.world_sizes=[16]", "name='a $(b)'"], run_dir="/work/run", image="lab/slt:1",
        name="My_Job", namespace="team", volume=["data:/data", "work:/work"], shm_gib=64, cpus=96, memory="900Gi",
        grace_seconds=600, export=["NCCL_DEBUG=INFO"],
    )  # fmt: skip
    assert document["metadata"] == {"name": "my-job", "namespace": "team"}
    replicas = document["spec"]["pytorchReplicaSpecs"]
    assert [replicas[kind]["replicas"] for kind in ("Master", "Worker")] == [1, 1]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    pod = replicas["Master"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 630 and pod["securityContext"] == {"runAsNonRoot": True}
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "cpu": "96", "memory": "900Gi"}
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/dev/shm", "/data", "/work"]
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert pod["volumes"][2]["persistentVolumeClaim"] == {"claimName": "work"}
    assert container["env"] == [{"name": "NCCL_DEBUG", "value": "INFO"}] and container["image"] == "lab/slt:1"
    line = container["command"][2].splitlines()[0]
    assert "'name='\"'\"'a $$(b)'\"'\"''" in line, "Kubernetes makes $( of $$("
    assert "--backend torchrun --nnodes 2 --rdzv-endpoint my-job-master-0:29400 --rdzv-id my-job" in line
    assert line.endswith(' --node-rank "$RANK" &') and "--num-procs 8" in line and "--grace-seconds 600" in line


def test_a_job_of_one_pod() -> None:
    document = job(sets=["train.world_sizes=[8]"])
    assert list(document["spec"]["pytorchReplicaSpecs"]) == ["Master"]
    (container,) = document["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert "torchrun" not in container["command"][2] and "node-rank" not in container["command"][2]


def ends(folder: Path, code: int, stop: bool = False) -> int:
    """Exit code of a pod whose launch ends with a code."""
    (folder / "slt").write_text(f'#!/bin/sh\necho "$@" > {folder}/argv\nexit {code}\n')
    (folder / "slt").chmod(0o755)
    if stop:
        (folder / "stop.json").touch()
    replicas = job(nodes=2, sets=["train.world_sizes=[16]"], run_dir=str(folder))["spec"]["pytorchReplicaSpecs"]
    (container,) = replicas["Worker"]["template"]["spec"]["containers"]
    env = {"PATH": f"{folder}:/usr/bin:/bin", "RANK": "1"}
    argv = [part.replace("$$(", "$(") for part in container["command"]]
    done = subprocess.run(argv, env=env, timeout=20, check=False, capture_output=True)
    assert (folder / "argv").read_text().split()[-2:] == ["--node-rank", "1"], done.stderr
    return done.returncode


def test_which_exit_codes_start_a_pod_again(tmp_path: Path) -> None:
    """The operator starts it again after 128 and above."""
    assert [ends(tmp_path, code) for code in (0, 1, 2, 3, 4, 5, 75, 137)] == [0, 1, 2, 143, 4, 5, 143, 137]
    assert ends(tmp_path, 75, stop=True) == 75, "slt launch stop"


def test_what_kubernetes_cannot_take() -> None:
    for given, expected in (
        ({"name": "!"}, "'!' makes no name of a Kubernetes job"),
        ({"volume": ["data"]}, "--volume data: write CLAIM:/folder"),
        ({"kind": "helm"}, r"--kind helm is unknown \(known: kubernetes, docker, apptainer\)"),
        ({"backend": "slurm"}, "--backend has no meaning in a manifest; say --nodes, --gpus-per-node"),
        ({"gpus_per_node": 0}, r"a recipe for GPUs .*, but the job has none"),
        ({"nodes": 3}, "is not a multiple of"),
        ({"kind": "docker", "nodes": 2, "sets": ["train.world_sizes=[16]"]}, "--kind docker describes one machine"),
    ):
        with pytest.raises(RecipeError, match=expected):
            text(**given)


def test_a_dockerfile() -> None:
    lines = text(kind="docker", sets=["train.world_sizes=[8]"], base_image="nvidia/cuda:13.0.2-devel").splitlines()
    steps = [line.partition(" ")[::2] for line in lines if line and not line.startswith("#")]
    names = [name for name, _ in steps]
    assert set(names) <= {"FROM", "RUN", "COPY", "USER", "ENV", "WORKDIR", "ENTRYPOINT", "CMD"} and names[0] == "FROM"
    assert steps[0] == ("FROM", "nvidia/cuda:13.0.2-devel")
    said = dict(steps)
    assert said["USER"] == "1000" and names.index("USER") < names.index("ENTRYPOINT"), "not as root"
    command = json.loads(said["ENTRYPOINT"]) + json.loads(said["CMD"])
    assert command[:6] == ["slt", "launch", "run", "phoenix14t_contrastive_8xh100", "--num-procs", "8"]
    copied = [value.split()[0] for name, value in steps if name == "COPY"]
    assert copied == list(PARTS) and all((ROOT / part).exists() for part in copied), "nothing else: no secret"
    torch = re.findall(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[0]
    runs = [value for name, value in steps if name == "RUN"]
    assert any(f"--constraint constraints.txt {torch} " in run for run in runs)
    for run in runs:
        assert subprocess.run(["sh", "-n", "-c", run], check=False).returncode == 0


def test_an_apptainer_definition() -> None:
    definition = text(kind="apptainer", sets=["train.world_sizes=[8]"])
    header, *rest = re.split(r"^%(\w+)\n", definition, flags=re.MULTILINE)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    assert "Bootstrap: docker\nFrom: python:3.11-slim\n" in header
    assert list(sections) == ["files", "post", "environment", "runscript"]
    assert [line.split()[0] for line in sections["files"].splitlines() if line.strip()] == list(PARTS)
    for name in ("post", "environment", "runscript"):
        assert subprocess.run(["sh", "-n", "-c", sections[name]], check=False).returncode == 0
    last = shlex.split(sections["runscript"].strip().splitlines()[-1])
    assert last[:7] == ["exec", "slt", "launch", "run", "phoenix14t_contrastive_8xh100", "--num-procs", "8"]


def test_container_files_need_a_checkout_and_an_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--base-image 'a b' is not the name of an image"):
        text(kind="docker", base_image="a b", sets=["train.world_sizes=[8]"])
    monkeypatch.setattr(containers, "PROJECT_ROOT", tmp_path)
    with pytest.raises(RecipeError, match=r"constraints.txt pins no torch; write container files in a checkout"):
        text(kind="apptainer", sets=["train.world_sizes=[8]"])


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "there" / "job.yaml"
    arguments = ["manifest", "demo_connector", "--kind", "kubernetes"]
    printed = CliRunner().invoke(app, arguments)
    written = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert printed.exit_code == written.exit_code == 0, printed.exception
    assert out.read_text() == printed.stdout and written.stdout == f"{out}\n"
    failed = CliRunner().invoke(app, [*arguments, "--out", str(out / "x")])
    assert isinstance(failed.exception, StorageError) and "could not be written: File exists" in str(failed.exception)
