"""What a host says of itself; tests of the verdict are in test_preflight.py."""

from __future__ import annotations

import json
import socket

import pytest

from launch.checks import CHECKS, READY
from launch.checks.__main__ import main
from launch.checks.port import port_in_use


def answers(
    capfdbinary: pytest.CaptureFixture[bytes], port: int, files: list[tuple[str, str]], gpus: bool = True
) -> dict[str, object]:
    assert main([json.dumps({"port": port, "files": files, "devices": gpus})]) == 0
    line = capfdbinary.readouterr().out.decode("ascii")
    assert line.startswith(f"{READY} ") and line.count("\n") == 1
    return json.loads(line.removeprefix(READY))  # type: ignore[no-any-return]


def test_what_a_host_says(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.checks.devices.listed_devices", lambda: 4)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port_in_use(port)
        assert answers(capfdbinary, port, []) == {"files": "", "devices": 4, "port": True}
        assert answers(capfdbinary, port, [], gpus=False)["devices"] == 0, "a driver that may hang is not asked"
    said = answers(capfdbinary, port, [("/", "unsaid"), ("/no/such", "has no \udcff")])
    assert said == {"files": "has no \udcff", "devices": 4, "port": False}


def test_every_check_has_a_name_of_its_own() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
