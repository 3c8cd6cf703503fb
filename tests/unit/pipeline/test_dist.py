"""Ranks from the launcher's variables, and collectives of a world of one."""

from __future__ import annotations

import datetime
import os
import sys
import types
from collections.abc import Callable

import pytest
import torch

from pipeline import dist
from pipeline.errors import ClusterError

VARIABLES = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def set_only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set these of the five variables and unset the others."""

    def apply(**values: str) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return apply


def test_a_launched_rank_knows_its_place(set_only: Callable[..., None]) -> None:
    set_only(**VARIABLES)
    ranks = dist.ranks_from_environment()
    assert ranks == dist.Ranks(rank=5, local_rank=1, world_size=8) and not ranks.is_main


def test_without_a_launcher_this_is_the_only_rank(set_only: Callable[..., None]) -> None:
    set_only()
    ranks = dist.ranks_from_environment()
    assert ranks == dist.Ranks(0, 0, 1) and ranks.is_main


@pytest.mark.parametrize("missing", [["LOCAL_RANK"], ["MASTER_ADDR", "MASTER_PORT"], list(VARIABLES)[1:]])
def test_half_an_environment_names_what_is_missing(set_only: Callable[..., None], missing: list[str]) -> None:
    present = {name: value for name, value in VARIABLES.items() if name not in missing}
    set_only(**present)
    with pytest.raises(ClusterError) as error:
        dist.ranks_from_environment()
    assert str(error.value) == (
        f"the environment sets {', '.join(present)} but not {', '.join(missing)}; a rank needs all five. "
        "Start it with `slt launch run`, `deepspeed` or `torchrun`."
    )
    assert error.value.exit_code == 3


@pytest.fixture
def init_fails(set_only: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let DeepSpeed's initialisation end with an error."""
    said = [""]

    def refuse(**options: object) -> None:
        raise RuntimeError(said[0])

    fake = types.ModuleType("deepspeed")
    fake.ops = types.SimpleNamespace(__compatible_ops__={})  # type: ignore[attr-defined]
    fake.init_distributed = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    monkeypatch.setitem(sys.modules, "deepspeed.ops", fake.ops)
    monkeypatch.setattr(dist.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    set_only(**VARIABLES)
    return lambda text: said.__setitem__(0, text)


def test_ranks_that_cannot_meet_are_a_cluster_error(init_fails: Callable[[str], None]) -> None:
    init_fails("Gloo connectFullMesh failed, remote=[127.0.1.1]:5519")
    with pytest.raises(ClusterError, match=r"rank 5 of 8 cannot join the others at node-0:29500: Gloo") as error:
        dist.init()
    assert "name the interface they share: GLOO_SOCKET_IFNAME=eth0" in str(error.value)


def test_a_port_in_use_names_the_option(init_fails: Callable[[str], None]) -> None:
    init_fails("The server socket has failed to listen. port: 29500, code: -98, name: EADDRINUSE")
    with pytest.raises(
        ClusterError, match=r"port 29500, where the ranks meet, is in use .*`slt launch run --master-port"
    ):
        dist.init()


@pytest.mark.parametrize(
    ("nccl", "gloo", "chosen"),
    [("eth3", None, "eth3"), ("=eth3", None, "eth3"), ("eth", None, None), ("^eth3", None, None), ("eth3", "lo", "lo")],
)
def test_hosts_talk_where_nccl_does(
    nccl: str, gloo: str | None, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gloo knows one name; NCCL also takes the beginning of names, and exceptions."""
    made: list[dict[str, object]] = []
    monkeypatch.setattr(dist, "_host_groups", [])
    monkeypatch.setattr(dist.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth3")])
    for name, value in {
        "get_world_size": lambda: 2, "get_backend": lambda: "nccl", "new_group": lambda **options: made.append(options),
    }.items():  # fmt: skip
        monkeypatch.setattr(dist.torch_dist, name, value)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", nccl)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", gloo or "")
    if gloo is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    dist._make_host_group(datetime.timedelta(minutes=3))
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen
    assert made == [{"backend": "gloo", "timeout": datetime.timedelta(minutes=3)}] and len(dist._host_groups) == 1


@pytest.mark.parametrize(
    ("asked", "found", "device"),
    [("", True, "cuda:1"), ("", False, "cpu"), ("cuda", True, "cuda:1"), ("cpu", True, "cpu"), ("cpu", False, "cpu")],
)
def test_the_device_is_the_one_that_was_asked_for(
    asked: str, found: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", asked)
    monkeypatch.setattr(dist.torch.cuda, "is_available", lambda: found)
    assert str(dist.device_for(dist.Ranks(5, 1, 8))) == device


def test_gpus_that_torch_does_not_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr(dist.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ClusterError, match=r"DS_ACCELERATOR=cuda\), but torch .* finds none on this host; install"):
        dist.init()


def test_a_world_of_one_needs_no_process_group() -> None:
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    local = torch.tensor([[1.0, 2.0]], requires_grad=True)
    assert dist.gather_rows(local) is local and dist.scatter_sum(local) is local
    counts = torch.tensor([3, 4])
    assert dist.all_reduce_sum(counts) is counts and dist.all_reduce_max(counts) is counts
    assert counts.tolist() == [3, 4]
    value = {"a": object()}
    assert dist.broadcast_object(value) is value and dist.gather_objects(value) == [value]
    assert dist.host_counts([5, 6]) == [[5, 6]] and dist.host_numbers([0.5]) == [[0.5]]
    assert dist.any_rank(True) and not dist.any_rank(False)
    dist.barrier()
    dist.shutdown()  # nothing to leave
