"""Real training jobs for tests: one process per rank, started as a launcher would, on a tiny generated corpus."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.rank_server import Rank, rank_server
from tests.source_tree import ROOT

TINY_LLM = "{tiny: {width: 32, layers: 2, heads: 2, feed_forward: 64, max_positions: 256}, tokenizer: TOKENIZER}"
TINY_VISUAL = (
    "{backbone: {tiny: {width: 24, layers: 1, heads: 2, feed_forward: 48, patch_pixels: 16}, train: full, pool: mean},"
    " width: 32, max_frames: 128, word: {layers: 2, window_frames: 8, stride: 4, heads: 2},"
    " sentence: {layers: 1, heads: 2}}"
)


@dataclass(frozen=True)
class World:
    """Folders of the tiny corpus every job of the test session shares."""

    root: Path

    @property
    def text(self) -> Path:
        return self.root / "shards" / "text"

    @property
    def video(self) -> Path:
        return self.root / "shards" / "video"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    def sets(self, stage: str, run_dir: Path, world_size: int, **values: object) -> list[str]:
        """Overrides that point a demo recipe at the tiny corpus; ``values`` use ``__`` for dots."""
        shards = self.text if stage == "continued_pretraining" else self.video
        given: dict[str, object] = {
            "run_dir": run_dir,
            "train.world_sizes": f"[{world_size}]",
            "train.log_every_steps": 1,
            "train.optimizer.warmup_steps": 1,
            "train.eval_every_steps": 0,
            "train.tensorboard": "false",
            "data.train": f"[{{shards: {shards}}}]",
            "data.eval": f"[{{shards: {shards}, split: dev}}]",
            "data.workers": 0,
            **self.models(stage),
            **{name.replace("__", "."): value for name, value in values.items()},
        }
        return [f"{name}={value}" for name, value in given.items()]

    def models(self, stage: str) -> dict[str, object]:
        """Tiny models per stage; later stages read the exports of the session's reference runs."""
        llm, encoder = self.root / "reference" / "llm", self.root / "reference" / "encoder"
        if stage == "continued_pretraining":
            tiny = TINY_LLM.replace("TOKENIZER", str(self.tokenizer))
            return {"model.llm": tiny, "data.block_tokens": 96, "train.global_batch": 8, "train.micro_batch": 2}
        if stage == "contrastive":
            return {
                "model.visual": TINY_VISUAL, "model.text_encoder.path": llm, "contrastive.embed": 32,
                "train.global_batch": 8, "train.micro_batch": 2,
            }  # fmt: skip
        return {
            "model.llm.path": llm, "model.visual.path": encoder, "connector.max_new_tokens": 6,
            "train.global_batch": 8, "train.micro_batch": 2,
        }  # fmt: skip


def start_ranks(
    stage: str,
    sets: list[str],
    world_size: int,
    env: dict[str, str] | None = None,
    script: str = "launch/train.py",
) -> list[Rank]:
    """Start every rank of a job; the caller waits."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [f"demo_{stage}"]
    for value in sets:
        arguments += ["--set", value]
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    envs = [
        {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})}
        for rank in range(world_size)
    ]
    return [rank_server().start(ROOT / script, arguments, each) for each in envs]


def finish(ranks: list[Rank], timeout: float = 180.0) -> tuple[list[int], str]:
    """Exit codes and joined output; ranks still running at the timeout are killed and fail the test."""
    deadline = time.monotonic() + timeout
    outputs = []
    try:
        for rank in ranks:
            outputs.append(rank.communicate(timeout=max(deadline - time.monotonic(), 1.0))[0])
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
                rank.communicate()
    return [int(rank.returncode) for rank in ranks], "\n".join(outputs)


def run_job(stage: str, sets: list[str], world_size: int, env: dict[str, str] | None = None) -> str:
    """Run a job to a good end; returns its output."""
    codes, output = finish(start_ranks(stage, sets, world_size, env))
    assert codes == [0] * world_size, f"exit codes {codes}\n{output[-6000:]}"
    return output


def wait_for(condition: Callable[[], bool], ranks: list[Rank], timeout: float = 120.0) -> None:
    """Until the condition holds; fails when a rank ends first."""
    deadline = time.monotonic() + timeout
    while not condition():
        ended = [rank for rank in ranks if rank.poll() is not None]
        assert not ended, f"a rank ended early:\n{ended[0].communicate()[0][-4000:]}"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def rows(run_dir: Path, name: str = "train/loss") -> dict[int, float]:
    """Step -> metric."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row[name] for row in map(json.loads, lines) if name in row}
