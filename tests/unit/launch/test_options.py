from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from launch import options
from launch.options import LaunchOptions, build_plan, deepspeed_env_files, free_port
from pipeline.config.load import load_recipe
from pipeline.config.recipe_file import recipe_file, write_resolved
from pipeline.errors import RecipeError

GPU_RECIPE = "phoenix14t_contrastive_8xh100"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with the number of GPUs that this machine shall have."""
    return lambda count: monkeypatch.setattr(options, "listed_devices", lambda: count)


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("a slots=1\nb slots=1\n")
    return path


def build(environ: dict[str, str] | None = None, **given: object):  # type: ignore[no-untyped-def]
    values = {"recipe": "demo_connector", "accelerator": "cpu", **given}
    return build_plan(LaunchOptions(**values), environ or {})  # type: ignore[arg-type]


def test_local_plan() -> None:
    plan, resolved = build(num_procs=2, sets=["seed=3"], run_dir="runs/there")
    assert plan.world_size == resolved.world_size == 2 and resolved.recipe.seed == 3
    assert plan.run_dir == Path("runs/there")
    file = recipe_file(resolved, Path("runs/there").absolute())
    assert plan.arguments == (str(file.path), "--sha256", file.sha256)
    assert plan.env["DS_ACCELERATOR"] == "cpu" and int(plan.env["OMP_NUM_THREADS"]) >= 1
    assert plan.master_addr == "127.0.0.1" and plan.script.name == "train.py"
    assert build()[0].world_size == 1, "the recipe's first world size"
    assert build(sets=["train.world_sizes=[2]"])[0].world_size == 2


@pytest.mark.parametrize(
    "folder", ["my run #2", "-v", "a: b", "123", "null", "~x", "[1]", "two\nlines", 'it\'s "é 你 \U0001f40c"']
)
def test_a_run_directory_of_any_name(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if folder == "~x":
        with pytest.raises(RecipeError, match="run_dir='~x': recipes do not expand variables or ~"):
            build(run_dir=folder)
    else:
        monkeypatch.chdir(tmp_path)
        plan, resolved = build(run_dir=folder)
        assert plan.run_dir == Path(folder)
        write_resolved(resolved, plan.run_dir)
        assert load_recipe(plan.arguments[0]).run_dir == folder, "the ranks read the same"


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
    assert plan.hosts[0].devices == (3, 1) and plan.needs_gpus
    plan, _ = build({"CUDA_VISIBLE_DEVICES": "GPU-12ab,MIG-3c/4"}, num_procs=2, accelerator="gpu")
    assert plan.hosts[0].devices == ("GPU-12ab", "MIG-3c/4") and [r.device for r in plan.ranks] == [
        "GPU-12ab",
        "MIG-3c/4",
    ]
    with pytest.raises(
        RecipeError, match="2 ranks need 2 devices, but CUDA_VISIBLE_DEVICES=0 shows 1; start fewer with"
    ):
        build({"CUDA_VISIBLE_DEVICES": "0"}, num_procs=2, accelerator="gpu")
    assert build({"CUDA_VISIBLE_DEVICES": "7", "DS_ACCELERATOR": "cpu"}, num_procs=2, accelerator="auto")[0].hosts[
        0
    ].devices == (0, 1)


@pytest.mark.parametrize("shown", ["-1", "", "NoDevFiles"])
def test_hidden_devices_are_none(shown: str, gpus: Any) -> None:
    gpus(4)
    environ = {"CUDA_VISIBLE_DEVICES": shown}
    assert build(environ, accelerator="auto")[0].accelerator == "cpu"
    with pytest.raises(RecipeError, match=rf"1 ranks need 1 devices, but CUDA_VISIBLE_DEVICES={shown} shows no GPU$"):
        build(environ, num_procs=1, accelerator="gpu")


def test_never_more_ranks_than_devices(gpus: Any) -> None:
    gpus(2)
    plan, _ = build(accelerator="auto", num_procs=2)
    assert plan.accelerator == "gpu" and plan.hosts[0].devices == (0, 1) and plan.env["DS_ACCELERATOR"] == "cuda"
    assert "DS_ACCELERATOR" not in build({"DS_ACCELERATOR": "xpu"}, accelerator="auto")[0].env, "the user's"
    with pytest.raises(
        RecipeError, match="8 ranks need 8 devices, but this machine shows 2; start fewer with --num-procs 2"
    ):
        build(accelerator="auto", num_procs=8)
    with pytest.raises(
        RecipeError, match=r"8 ranks \(the recipe's first world size\) need 8 devices, but this machine shows 2"
    ):
        build(recipe=GPU_RECIPE, accelerator="auto")


def test_a_recipe_for_gpus_on_a_machine_without(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    with pytest.raises(
        RecipeError, match=r"8 ranks .* of a recipe for GPUs \(deepspeed.base=auto\), but this machine shows"
    ):
        build(recipe=GPU_RECIPE, accelerator="auto")
    with pytest.raises(RecipeError, match=r"this machine shows no GPU; name machines .* --accelerator cpu"):
        build(recipe=GPU_RECIPE, accelerator="auto", num_procs=2)
    monkeypatch.setattr(options.os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(
        RecipeError, match=r"are more than the 2 processor cores of this machine; say how many .*--num-procs N"
    ):
        build(recipe=GPU_RECIPE, accelerator="cpu")
    assert build(recipe=GPU_RECIPE, accelerator="cpu", num_procs=8)[0].world_size == 8, "asked for"
    assert build({"DS_ACCELERATOR": "cpu"}, recipe=GPU_RECIPE, accelerator="auto", num_procs=1)[0].accelerator == "cpu"


def test_hosts_that_must_have_gpus(hostfile: Path) -> None:
    sets = ["train.world_sizes=[2]"]
    plan, _ = build(recipe=GPU_RECIPE, hostfile=hostfile, accelerator="auto", sets=sets)
    assert plan.needs_gpus and plan.env["DS_ACCELERATOR"] == "cuda"
    assert not build(recipe=GPU_RECIPE, hostfile=hostfile, accelerator="cpu", sets=sets)[0].needs_gpus
    assert not build(hostfile=hostfile, accelerator="auto")[0].needs_gpus, "a recipe for processors"


def test_contradictions(hostfile: Path) -> None:
    with pytest.raises(RecipeError, match="--num-procs and --hostfile cannot be combined"):
        build(num_procs=2, hostfile=hostfile)
    with pytest.raises(RecipeError, match="--include and --exclude select from a hostfile; add --hostfile"):
        build(include="a")
    with pytest.raises(RecipeError, match="--accelerator must be auto, cpu or gpu, got tpu"):
        build(accelerator="tpu")
    with pytest.raises(RecipeError, match="= 12; 12 or 24 would be"):
        build(num_procs=3, sets=["train.global_batch=16", "train.micro_batch=4"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"backend": "local", "hostfile": True}, "--backend local starts ranks on this machine and does not read"),
        ({"backend": "torchrun", "hostfile": True}, "for torchrun say --nnodes and --num-procs on every host"),
        ({"ssh_port": 2222}, "--ssh-port is that of the hosts of a --hostfile"),
        ({"ssh_port": 2222, "hostfile": True, "no_ssh": True, "node_rank": 0}, "without ssh leave it out"),
        ({"backend": "torchrun", "nnodes": 2, "master_port": 1}, "are not read with --nnodes; ranks meet by --rdzv-"),
    ],
)
def test_options_that_nobody_would_read(given: dict[str, object], text: str, hostfile: Path) -> None:
    with pytest.raises(RecipeError, match=text):
        build(**{**given, **({"hostfile": hostfile} if "hostfile" in given else {})})


def test_exports() -> None:
    plan, _ = build(export=["TOKENIZERS_PARALLELISM=true", "SLT_MAX_TOKENS=9", 'A={"a": "b"}'])
    assert [plan.env[n] for n in ("TOKENIZERS_PARALLELISM", "SLT_MAX_TOKENS", "A")] == ["true", "9", '{"a": "b"}']
    with pytest.raises(RecipeError, match=r"--export A;id=1: 'A;id' is not the name of a variable \(letters, digits"):
        build(export=["A;id=1"])
    with pytest.raises(RecipeError, match="exported values show in process lists; log in on every host"):
        build({"WANDB_API_KEY": "x"}, export=["WANDB_API_KEY"])
    with pytest.raises(RecipeError, match="--export ABSENT: the variable is not set here; write --export ABSENT=VALUE"):
        build(export=["ABSENT"])


def test_deepspeed_env_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    assert deepspeed_env_files() == {}
    (tmp_path / ".deepspeed_env").write_text('A= x="$HOME" \u2028\x0c \n\nB=\n', encoding="utf-8-sig")
    assert deepspeed_env_files() == {"A": ' x="$HOME" \u2028\x0c ', "B": ""}
    (tmp_path / ".deepspeed_env").write_text("A=1\nB\n")
    with pytest.raises(RecipeError, match=r"\.deepspeed_env:2: 'B' is not of the form NAME=VALUE"):
        deepspeed_env_files()


def test_a_deepspeed_env_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").touch()

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(RecipeError, match=r"\.deepspeed_env cannot be read: Permission denied"):
        deepspeed_env_files()


def test_what_comes_first_of_two_values(hostfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--export, then this environment, then the files; the search paths of this environment come last."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("PATH=/theirs\nOMP_NUM_THREADS=3\nHF_HOME=/file\nPYTHONPATH=/mine\n")
    environ = {"PATH": "/here", "LD_LIBRARY_PATH": "/lib", "HF_HOME": "/env", "NCCL_SECRET": "x", "PYTHONHASHSEED": "7"}
    env = build(environ, hostfile=hostfile)[0].env
    names = ("PATH", "LD_LIBRARY_PATH", "HF_HOME", "OMP_NUM_THREADS", "NCCL_SECRET", "PYTHONHASHSEED")
    assert [env.get(name) for name in names] == ["/theirs", "/lib", "/env", "3", None, "7"]
    assert env["PYTHONPATH"].endswith(":/mine")
    assert build(environ, hostfile=hostfile, export=["HF_HOME=/x", "PATH=/y"])[0].env["HF_HOME"] == "/x"


def test_free_port() -> None:
    with socket.socket() as probe:
        port = free_port()
        probe.bind(("127.0.0.1", port))  # raises when somebody has it
        assert probe.getsockname()[1] == port > 0


def test_a_launcher_on_every_host(hostfile: Path) -> None:
    plan, _ = build(hostfile=hostfile, no_ssh=True, node_rank=1)
    assert plan.node_rank == 1 and plan.world_size == 2 and plan.master_addr == "a" and not plan.leads
    torchrun = {"backend": "torchrun", "nnodes": 2, "num_procs": 1}
    plan, _ = build(**torchrun, rdzv_endpoint="127.0.0.1:29400")
    assert plan.master_addr == "127.0.0.1" and plan.master_port == 29400
    assert plan.node_rank == 0 and plan.rendezvous == ("127.0.0.1:29400", "slt") and plan.world_size == 2
    plan, _ = build(**torchrun, rdzv_endpoint="no-such-host.invalid:29400", rdzv_id="x")
    assert plan.node_rank == 1 and plan.rendezvous == ("no-such-host.invalid:29400", "x")
    assert build(**torchrun, rdzv_endpoint="127.0.0.1:29400", node_rank=1)[0].node_rank == 1
    assert build(backend="torchrun", num_procs=2)[0].node_rank is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"no_ssh": True, "node_rank": 0}, "--no-ssh goes with --hostfile and this host's --node-rank"),
        ({"no_ssh": True, "hostfile": True}, "--no-ssh goes with --hostfile and this host's --node-rank"),
        ({"no_ssh": True, "hostfile": True, "node_rank": 2}, "--node-rank 2: there are 2 hosts, numbered from 0"),
        ({"node_rank": 0}, "--node-rank belongs to --no-ssh or to --nnodes"),
        ({"nnodes": 2, "num_procs": 1}, "--nnodes and --rdzv-endpoint belong to --backend torchrun"),
        ({"backend": "torchrun", "rdzv_endpoint": "a:1"}, "are read with --nnodes 2 or more; one host meets nobody"),
        ({"rdzv_id": "mine"}, "are read with --nnodes 2 or more; one host meets nobody"),
        ({"nnodes": 2, "backend": "torchrun"}, "--nnodes needs --num-procs, the ranks of every host"),
        ({"nnodes": 2, "backend": "torchrun", "num_procs": 1}, "--nnodes needs --rdzv-endpoint HOST:PORT"),
    ],
)
def test_launchers_that_cannot_meet(given: dict[str, object], text: str, hostfile: Path) -> None:
    if "hostfile" in given:
        given = {**given, "hostfile": hostfile}
    with pytest.raises(RecipeError, match=text):
        build(**given)
