from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from launch.hostfile import Host
from launch.plan import plan_ranks, threads_per_rank


def test_ranks_in_host_order() -> None:
    ranks = plan_ranks((Host("a", (0, 1)), Host("b", (2, 3))), "a", 29500)
    assert [(r.rank, r.host, r.node_rank, r.local_rank, r.device) for r in ranks] == [
        (0, "a", 0, 0, 0), (1, "a", 0, 1, 1), (2, "b", 1, 0, 2), (3, "b", 1, 1, 3),
    ]  # fmt: skip
    assert {(r.world_size, r.master) for r in ranks} == {(4, ("a", 29500))}


def test_uneven_hosts_are_numbered_as_deepspeed_does() -> None:
    ranks = plan_ranks((Host("a", (0,)), Host("b", (4, 5))), "a", 1)
    assert [(r.rank, r.local_rank, r.device) for r in ranks] == [(0, 0, 0), (1, 1, 5), (2, 0, 4)]


@given(st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_every_device_gets_one_rank(slots: list[int]) -> None:
    hosts = tuple(Host(f"h{number}", tuple(range(count))) for number, count in enumerate(slots))
    ranks = plan_ranks(hosts, "h0", 1)
    assert [r.rank for r in ranks] == list(range(sum(slots)))
    assert {(r.host, r.device) for r in ranks} == {(h.name, d) for h in hosts for d in h.devices}
    assert {(r.host, r.local_rank) for r in ranks} == {(h.name, n) for h in hosts for n in range(h.slots)}


def test_threads_per_rank() -> None:
    assert (threads_per_rank(2, 2), threads_per_rank(64, 8), threads_per_rank(1, 4)) == (1, 8, 1)
