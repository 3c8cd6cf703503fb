"""The helper that starts real ranks: results by rank, a child's own traceback, no survivor after a timeout."""

from __future__ import annotations

import time

import pytest

from tests.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.multiproc


def _sum_over_ranks(rank: int, world_size: int, start: float) -> tuple[int, float]:
    import torch
    import torch.distributed

    value = torch.tensor(start + rank)
    torch.distributed.all_reduce(value)
    return world_size, value.item()


def _second_rank_fails(rank: int, world_size: int) -> None:
    import torch.distributed

    if rank == 1:
        raise ValueError("rank one gave up")
    torch.distributed.barrier()


def _never_ends(rank: int, world_size: int) -> None:
    time.sleep(600)


def test_results_come_back_by_rank() -> None:
    assert run_ranks(_sum_over_ranks, 2, 10.0) == [(2, 21.0), (2, 21.0)]


def test_a_failing_rank_is_reported_with_its_traceback() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailure, match=r"(?s)rank-1 exited with 1.*_second_rank_fails.*rank one gave up"):
        run_ranks(_second_rank_fails, 2, timeout=60)
    assert time.monotonic() - started < 60, "rank 0 was left waiting in its barrier"


def test_a_hang_is_killed_and_shows_where() -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank-0 still running after 4 s.*_never_ends"):
        run_ranks(_never_ends, 1, timeout=4.0)
