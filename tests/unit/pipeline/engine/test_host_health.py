"""What a host measures of itself; a trial of several is in tests/multiproc/test_host_health.py."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
import torch

from pipeline.engine import host_health
from pipeline.engine.host_health import MARK, Sizes, is_here, main, measure, partners, products

CPU = torch.device("cpu")


@pytest.mark.parametrize("hosts", range(2, 9))
def test_partners(hosts: int) -> None:
    """Everybody meets somebody else in every round, and the feeling is mutual."""
    met = [list(partners(rank, hosts)) for rank in range(hosts)]
    for rank, row in enumerate(met):
        assert len(set(row)) == len(row) >= min(host_health.ROUNDS, hosts - 1) - hosts % 2 and rank not in row
        assert all(rank in met[partner] for partner in row)


def test_products_are_exact() -> None:
    found = products(CPU, Sizes(64, 0.01, 0))
    assert found["sound"] and found["tflops"] > 0
    left, right = host_health._matrices(64, CPU)
    exact = left.long() @ right.long()
    places = torch.arange(64 * 64).remainder(97).reshape(64, 64)
    assert found["sums"] == [float(exact.sum()), float((exact * places).sum())]


def test_a_device_that_fails_is_said_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(device: torch.device, sizes: Sizes) -> dict[str, Any]:
        raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(host_health, "products", broken)
    assert measure({"level": "quick", "hosts": 1, "devices": [0]}) == {
        "devices": {"0": {"problem": "CUDA error: uncorrectable ECC error"}}
    }
    main(["{}"])
    assert capsys.readouterr().out == f"{MARK} {json.dumps({'problem': 'KeyError: ' + repr('level')})}\n"


def test_whose_address_it_is() -> None:
    assert is_here("127.0.0.1") and not is_here("192.0.2.1") and not is_here("no-such-host.invalid")


def test_a_store_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bool] = []

    def store(address: str, port: int, size: None, serves: bool, limit: object, wait_for_workers: bool) -> str:
        tried.append(serves)
        if serves:
            raise RuntimeError("EADDRINUSE")
        return "client"

    monkeypatch.setattr(host_health, "Store", store)
    limit = datetime.timedelta(seconds=1)
    assert host_health._meet("127.0.0.1", 1, limit) == ("client", False) and tried == [True, False]
    monkeypatch.setattr(host_health, "Store", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("EACCES")))
    with pytest.raises(RuntimeError, match="EACCES"):
        host_health._meet("127.0.0.1", 1, limit)
