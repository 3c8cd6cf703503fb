from __future__ import annotations

from pathlib import Path

import pytest

from launch.devices import listed_devices, visible_devices
from pipeline.errors import RecipeError

LISTED = """\
GPU 0: NVIDIA A100 (UUID: GPU-1)
  MIG 3g.20gb     Device  0: (UUID: MIG-1)
GPU 1: NVIDIA A100 (UUID: GPU-2)
"""


def nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "bin" / "nvidia-smi"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")


def test_devices_as_nvidia_smi_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "listed").write_text(LISTED)
    nvidia_smi(tmp_path, f"cat {tmp_path}/listed", monkeypatch)
    assert listed_devices(tmp_path) == 2


@pytest.mark.parametrize("script", ["echo GPU 0: stale; exit 9", "exit 0"])
def test_device_files_where_nvidia_smi_fails(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, script, monkeypatch)
    assert listed_devices(tmp_path) == 0
    (tmp_path / "dev" / "dri").mkdir(parents=True)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "dri/renderD128"):
        (tmp_path / "dev" / name).touch()
    assert listed_devices(tmp_path) == 2, "a display adapter is no GPU to train on"


def test_amd_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for node, number in enumerate(("0", "41234", "5678")):
        path = tmp_path / "sys/class/kfd/kfd/topology/nodes" / str(node) / "gpu_id"
        path.parent.mkdir(parents=True)
        path.write_text(f"{number}\n")
    assert listed_devices(tmp_path) == 2


@pytest.mark.parametrize(
    ("value", "listed", "seen"),
    [
        (None, 2, (0, 1)),
        (None, 0, ()),
        ("", 2, ()),
        ("-1", 2, ()),
        ("NoDevFiles", 2, ()),
        ("1,0", 2, (1, 0)),
        (" 1 , 0 ", 0, (1, 0)),
        ("0,5,1", 2, (0,)),  # as CUDA reads it: nothing from the first wrong entry on
        ("0,-1,1", 2, (0,)),
        ("GPU-1,MIG-1,MIG-GPU-2/3/0", 2, ("GPU-1", "MIG-1", "MIG-GPU-2/3/0")),
        ("GPU-1;id", 2, ()),
    ],
)
def test_visible_devices(value: str | None, listed: int, seen: tuple[int | str, ...]) -> None:
    assert visible_devices({} if value is None else {"CUDA_VISIBLE_DEVICES": value}, listed) == seen


def test_a_device_named_twice() -> None:
    with pytest.raises(RecipeError, match="CUDA_VISIBLE_DEVICES=0,1,0 names device 0 twice; name each device once"):
        visible_devices({"CUDA_VISIBLE_DEVICES": "0,1,0"}, 2)
