from __future__ import annotations

import socket
from pathlib import Path

import pytest

from launch.options import LaunchOptions, build_plan, deepspeed_env_files, free_port
from pipeline.errors import RecipeError


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("a slots=1\nb slots=1\n")
    return path


def build(environ: dict[str, str] | None = None, **options: object):  # type: ignore[no-untyped-def]
    values = {"recipe": "demo_connector", "accelerator": "cpu", **options}
    return build_plan(LaunchOptions(**values), environ or {})  # type: ignore[arg-type]


def test_local_plan() -> None:
    plan, resolved = build(num_procs=2, sets=["seed=3"], run_dir="runs/there")
    assert plan.world_size == resolved.world_size == 2 and resolved.recipe.seed == 3
    assert plan.run_dir == Path("runs/there")
    assert plan.arguments[1:] == ("--set", "seed=3", "--set", "run_dir=runs/there")
    assert plan.env["DS_ACCELERATOR"] == "cpu" and int(plan.env["OMP_NUM_THREADS"]) >= 1
    assert plan.master_addr == "127.0.0.1" and plan.script.name == "train.py"
    assert build()[0].world_size == 1, "the recipe's first world size"
    assert build(sets=["train.world_sizes=[2]"])[0].world_size == 2


def test_the_users_threads_win() -> None:
    assert "OMP_NUM_THREADS" not in build({"OMP_NUM_THREADS": "7"})[0].env


def test_hosts(hostfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("MINE=1\n\nGLOO_SOCKET_IFNAME=eth9\n")
    environ = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "INFO", "SECRET": "x", "MODE": "fast"}
    plan, _ = build(environ, hostfile=hostfile, export=["MODE", "LEVEL=2"], accelerator="auto")
    assert plan.master_addr == "a" and plan.master_port == 29500 and plan.world_size == 2
    assert {k: plan.env.get(k) for k in ("MINE", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "MODE", "LEVEL", "SECRET")} == {
        "MINE": "1", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_DEBUG": "INFO", "MODE": "fast", "LEVEL": "2", "SECRET": None,
    }  # fmt: skip
    assert "DS_ACCELERATOR" not in plan.env, "the launching machine says nothing about the hosts' devices"
    assert build(hostfile=hostfile, exclude="b")[0].world_size == 1


def test_visible_devices() -> None:
    plan, _ = build({"CUDA_VISIBLE_DEVICES": "3,1"}, num_procs=2, accelerator="gpu")
    assert plan.hosts[0].devices == (3, 1) and plan.visible_devices
    with pytest.raises(RecipeError, match="names devices by UUID, which DeepSpeed's launcher cannot pass on"):
        build({"CUDA_VISIBLE_DEVICES": "GPU-12ab"}, accelerator="gpu")
    with pytest.raises(RecipeError, match="2 ranks need 2 devices, but CUDA_VISIBLE_DEVICES=0 shows 1"):
        build({"CUDA_VISIBLE_DEVICES": "0"}, num_procs=2, accelerator="gpu")
    assert not build({"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cpu"}, num_procs=2, accelerator="auto")[
        0
    ].visible_devices


def test_contradictions(hostfile: Path) -> None:
    with pytest.raises(RecipeError, match="--num-procs and --hostfile cannot be combined"):
        build(num_procs=2, hostfile=hostfile)
    with pytest.raises(RecipeError, match="--include and --exclude select from a hostfile; add --hostfile"):
        build(include="a")
    with pytest.raises(RecipeError, match="--accelerator must be auto, cpu or gpu, got tpu"):
        build(accelerator="tpu")
    with pytest.raises(RecipeError, match="= 12; 12 or 24 would be"):
        build(num_procs=3, sets=["train.global_batch=16", "train.micro_batch=4"])


def test_exports() -> None:
    with pytest.raises(RecipeError, match="exported values show in process lists; log in on every host"):
        build({"WANDB_API_KEY": "x"}, export=["WANDB_API_KEY"])
    with pytest.raises(RecipeError, match="--export ABSENT: the variable is not set here; write --export ABSENT=VALUE"):
        build(export=["ABSENT"])


def test_bad_deepspeed_env_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    assert deepspeed_env_files() == {}
    (tmp_path / ".deepspeed_env").write_text("A=1\nB\n")
    with pytest.raises(RecipeError, match=r"\.deepspeed_env:2: 'B' is not of the form NAME=VALUE"):
        deepspeed_env_files()


def test_free_port() -> None:
    with socket.socket() as probe:
        port = free_port()
        probe.bind(("127.0.0.1", port))  # raises when somebody has it
        assert probe.getsockname()[1] == port > 0
