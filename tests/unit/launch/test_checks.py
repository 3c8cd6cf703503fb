"""What a host says of itself, and how each check judges it; tests of the whole are in test_preflight.py."""

from __future__ import annotations

import json
import resource
import socket
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import devices as listing
from launch.checks import CHECKS, READY, inputs, resources, software
from launch.checks.__main__ import main
from launch.checks.base import Launch, odd_ones
from launch.checks.clocks import Clocks
from launch.checks.devices import Devices
from launch.checks.inputs import Inputs
from launch.checks.port import port_in_use
from launch.checks.resources import Resources
from launch.checks.software import Software, driver_version, source_hash
from launch.hostfile import Host
from launch.options import free_port
from launch.plan import LaunchPlan, plan_ranks
from pipeline.config.load import load_recipe
from tests.unit.shards.shard_sets import write_videos

HOST = Host("b", (0, 1))
QUESTIONS: dict[str, Any] = {"software": False, "clocks": 0.0, "resources": {}, "inputs": []}


def launch(folder: Path, *sets: str, gpus: bool = False) -> Launch:
    hosts = (Host("a", (0, 1)), HOST)
    plan = LaunchPlan(folder / "x.py", (), folder / "run", hosts, plan_ranks(hosts, "a", free_port()), "id7")
    marker = folder / "marker"
    return Launch(replace(plan, needs_gpus=gpus), load_recipe("demo_connector", sets), marker)


def answers(
    capfdbinary: pytest.CaptureFixture[bytes], port: int, files: list[tuple[str, str]], gpus: bool = True
) -> dict[str, Any]:
    assert main([json.dumps({**QUESTIONS, "port": port, "files": files, "devices": gpus})]) == 0
    lines = capfdbinary.readouterr().out.decode("ascii").splitlines()
    assert all(line.startswith(f"{READY} ") for line in lines) and len(lines) == len(CHECKS)
    found = dict(line.split(" ", 2)[1:] for line in lines)
    return {name: json.loads(text)["answer"] for name, text in found.items()}


def test_what_a_host_says(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.checks.devices.listed_devices", lambda: 4)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port_in_use(port)
        said = answers(capfdbinary, port, [])
        assert said["files"] == "" and said["devices"]["count"] == 4 and said["port"]
        assert answers(capfdbinary, port, [], gpus=False)["devices"]["count"] == 0, (
            "a driver that may hang is not asked"
        )
    said = answers(capfdbinary, port, [("/", "unsaid"), ("/no/such", "has no \udcff")])
    assert said["files"] == "has no \udcff" and not said["port"]


def test_every_check_has_a_name_of_its_own() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_majority() -> None:
    assert odd_ones({"a": 1, "b": 2, "c": 1}, 2) == (1, ["b"])
    assert odd_ones({"a": 1, "b": 2}, 2) == (2, ["a"]), "this machine decides between two"


# -- software --------------------------------------------------------------------------------------------------------
def test_hosts_with_other_code_or_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {"sources": "1" * 64, "torch": "2.11.0"}
    monkeypatch.setattr(Software, "look", lambda self, question: usual)
    given = {"a": usual, "b": {"sources": "2" * 64, "torch": "2.10.0"}, "c": usual, "d": {"sources": "1" * 64}}
    assert Software().compare(launch(tmp_path), given) == {
        "b": f"has other code in {software.PROJECT_ROOT} (222222222222, the others 111111111111); has torch 2.10.0, the"
        " others 2.11.0; bring its checkout and environment to the state of the others",
        "d": "has torch not installed, the others 2.11.0; bring its checkout and environment to the state of the"
        " others",
    }


def test_identity_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "a.py").write_text("1")
    first = source_hash(tmp_path)
    (tmp_path / "launch" / "a.pyc").write_text("2")
    assert source_hash(tmp_path) == first
    (tmp_path / "launch" / "a.py").write_text("2")
    assert source_hash(tmp_path) != first
    assert {"sources", "python", "torch", "deepspeed"} <= set(Software().look(True))


def test_the_driver_s_version(tmp_path: Path) -> None:
    assert driver_version(tmp_path / "version") == {}
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build  (root@host)\n"
    )
    assert driver_version(tmp_path / "version") == {"NVIDIA driver": "570.133.20"}


# -- clocks ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("off", "said"), [(-400, "has a clock 400 s behind this machine's; set it by NTP"), (400, "s ahead of"), (0, "")]
)
def test_clocks(off: float, said: str, tmp_path: Path) -> None:
    now = time.time()
    asked, theirs = Clocks().look(Clocks().question(launch(tmp_path)))
    assert now <= asked <= theirs
    reason = Clocks().judge(launch(tmp_path), HOST, (asked, theirs + off))
    assert said in reason and bool(reason) == bool(off)


# -- resources -------------------------------------------------------------------------------------------------------
Usage = namedtuple("Usage", "total used free")


def test_room_shared_memory_and_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = launch(tmp_path, f"data.cache_dir={tmp_path}/cache/of/it", "data.cache_gib=2", gpus=True)
    assert Resources().question(wanted) == {"run_dir": f"{tmp_path}/run", "data.cache_dir": f"{tmp_path}/cache/of/it"}
    said = Resources().look(Resources().question(wanted))
    assert not Resources().judge(wanted, HOST, said) and not list(tmp_path.iterdir())
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Usage(0, 0, 64 << 20))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 256))
    said = Resources().look(Resources().question(wanted))
    assert Resources().judge(wanted, HOST, said) == (
        "has 0.1 GiB for data.cache_dir, less than data.cache_gib=2; free space, or lower it; has 64 MiB of /dev/shm, 2"
        " ranks need 128; start its container with --shm-size=8g or --ipc=host; lets a process open 256 files, fewer"
        " than 1024; raise it (ulimit -n, or /etc/security/limits.conf)"
    )


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    wanted = launch(tmp_path)
    said = Resources().look({"run_dir": "/proc/no"})
    assert Resources().judge(wanted, HOST, said).startswith("cannot write run_dir: /proc: ")


# -- devices ---------------------------------------------------------------------------------------------------------
SMI = """#!/bin/sh
case "$1" in
-L) echo 'GPU 0: one'; echo 'GPU 1: two';;
--query-gpu*) echo '0, GPU-aa, 3, 81920'; echo '1, GPU-bb, 40960, 81920'; echo '2, GPU-cc, [N/A], 1';;
*) echo 'GPU-bb, 4711, python';;
esac
"""


def test_devices_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    wanted = launch(tmp_path, gpus=True)
    said = json.loads(json.dumps(Devices().look(Devices().question(wanted))))
    text = "has devices in use: GPU 1 has 40.0 of 80 GiB in use (process 4711, python); end those processes, or leave"
    assert Devices().judge(wanted, HOST, said).startswith(text)
    assert not Devices().judge(wanted, Host("b", (0,)), said), "nobody wants the other one"
    assert not Devices().judge(replace(wanted, marker=None), HOST, said) and f"this machine {text}" in caplog.text
    assert Devices().judge(wanted, Host("b", ("GPU-bb",)), said).startswith(text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    said = json.loads(json.dumps(Devices().look(True)))
    assert not Devices().judge(wanted, Host("b", (0,)), said), "the job's first device is not the one in use"
    assert Devices().judge(wanted, HOST, said) == "has 1 GPU, but the job gives it 2 ranks"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    said = json.loads(json.dumps(Devices().look(True)))
    assert Devices().judge(wanted, Host("b", (0,)), said).startswith(text), "the job's first device is number 1"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    smi.write_text("#!/bin/sh\nexit 9")
    assert listing.memory_of_devices() == []
    smi.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert listing.memory_of_devices() == []


# -- inputs ----------------------------------------------------------------------------------------------------------
def test_shards_and_models_with_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = tmp_path / "set", tmp_path / "llm"
    write_videos(folder, [b"x" * 900] * 60, [3] * 60, per_shard=2)
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"12345")
    monkeypatch.setattr("pipeline.config.load.BUILTIN_RECIPES", inputs.Path("launch/recipes").absolute())
    sets = [f"data.train=[{{shards: 'file://{folder}'}}]", "data.eval=[{shards: 's3://b/c'}]", "data.cache_dir=c"]
    wanted = launch(tmp_path, *sets, f"model.llm.path={model}")
    assert Inputs().question(wanted) == [str(folder), str(model)]
    assert Inputs().question(replace(wanted, marker=None)) == []
    before = Inputs().look(Inputs().question(wanted))
    assert before == Inputs().look(Inputs().question(wanted)) and not Inputs().compare(
        wanted, {"a": before, "b": before}
    )
    (model / "model.safetensors").write_bytes(b"1234")
    with (folder / "train-000000.tar").open("r+b") as handle:
        handle.write(b"y")
    after = Inputs().look(Inputs().question(wanted))
    assert set(before) == {folder for folder in before if after[folder] != before[folder]}
    assert Inputs().compare(wanted, {"a": after, "b": before, "c": after}) == {
        "b": f"has another {folder} than the others; copy it again, or correct its mount"
    }
    (folder / "train-000000.tar").unlink()
    gone = Inputs().look([str(folder)]) | {str(model): after[str(model)]}
    reason = f"cannot read {folder}/train-000000.tar (No such file or directory); copy it again, or correct its mount"
    assert Inputs().compare(wanted, {"a": after, "b": gone, "c": after}) == {"b": reason}
    assert Inputs().compare(wanted, {"a": gone, "b": gone}) == {"a": reason, "b": reason}, "all of them"
