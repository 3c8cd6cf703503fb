"""Real gloo ranks for tests: processes of their own, a file instead of a port, no hang outlives its timeout."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.rank_server import Rank, rank_server


class RankFailure(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback or its stack when time ran out."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 90.0) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` in ``world_size`` processes that share a gloo process group.

    The launcher's five variables are set as in a real job. ``fn`` must live at the top of an importable test module;
    arguments and results must pickle (tensors may).

    Args:
        fn: what each rank runs.
        world_size: number of processes.
        args: passed on to every rank.
        timeout: seconds for all of it, imports included; then the children are killed.

    Returns:
        The ranks' results, by rank.

    Raises:
        RankFailure: some rank raised, exited or was still running at the timeout.
    """
    with tempfile.TemporaryDirectory(prefix="slt-ranks-") as name:
        folder, children = Path(name), {}
        for rank in range(world_size):
            call = folder / f"rank-{rank}.call"
            call.write_bytes(pickle.dumps((fn, rank, world_size, args, folder, timeout)))
            script = Path(__file__).with_name("rank_call.py")
            children[f"rank-{rank}"] = rank_server().start(script, [str(call)], dict(os.environ))
        try:
            _wait(children, folder, time.monotonic() + timeout, timeout)
        finally:
            _end(children.values())
        return [pickle.loads((folder / f"rank-{rank}.result").read_bytes()) for rank in range(world_size)]


def _wait(children: Mapping[str, Rank], folder: Path, deadline: float, timeout: float) -> None:
    """Until every child has ended well; the first failure ends the wait."""
    running = dict(children)
    while running:
        wait_seconds = max(deadline - time.monotonic(), 0)
        multiprocessing.connection.wait(list(running.values()), wait_seconds)
        ended = [name for name, child in running.items() if child.poll() is not None]
        if not ended:
            stacks = "\n".join(_note(folder, name, "stack") for name in running)
            raise RankFailure(f"{', '.join(running)} still running after {timeout:g} s\n{stacks}")
        for name in ended:
            code = running.pop(name).wait()
            if code != 0:
                raise RankFailure(f"{name} exited with {code}\n{_note(folder, name, 'error')}")


def _note(folder: Path, name: str, kind: str) -> str:
    file = folder / f"{name}.{kind}"
    return f"-- {name}\n{file.read_text()}" if file.exists() else f"-- {name} left no {kind}"


def _end(children: Iterable[Rank]) -> None:
    for child in children:
        child.kill()
        child.wait()


def child(
    fn: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], folder: Path, timeout: float
) -> None:
    """One rank: join, run, leave the result or the traceback as a file."""
    with (folder / f"rank-{rank}.stack").open("w") as stack:
        # a little before the parent gives up, so that a hang shows where it hangs
        faulthandler.dump_traceback_later(max(timeout - 2.0, 0.5 * timeout), file=stack)
        try:
            _join(rank, world_size, folder, timeout)
            result = fn(rank, world_size, *args)
            (folder / f"rank-{rank}.result").write_bytes(pickle.dumps(result))
        except BaseException:
            (folder / f"rank-{rank}.error").write_text(traceback.format_exc())
            os._exit(1)  # no clean-up that could wait for the other ranks
        finally:
            faulthandler.cancel_dump_traceback_later()
    _leave()


def _join(rank: int, world_size: int, folder: Path, timeout: float) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"
    )
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name need not resolve
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )


def _leave() -> None:
    """End at once and well: results are on disk, and a rank must not wait for another one's destructors."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
