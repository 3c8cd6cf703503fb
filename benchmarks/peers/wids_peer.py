"""``wids``: random access to our tars through memory maps."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wids
from torch.utils.data import DataLoader
from workloads import (
    BATCH,
    COLLATE,
    MEMBERS_PER_BATCH,
    block,
    clip,
    collate_members,
    link,
    split_documents,
    tar_samples,
)

LIST = "shards.json"


def prepare(source: Path, out: Path, kind: str) -> None:
    """It wants to know how many samples each shard holds."""
    shards = [{"url": str(path), "nsamples": sum(1 for _ in tar_samples(path))} for path in link(source, out)]
    (out / LIST).write_text(json.dumps(shards))


class _Samples:
    """Map-style view of the shards with our decoding."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind = kind
        shards = json.loads((folder / LIST).read_text())
        # localname: read the shard where it lies; by default it would be linked into a cache folder first
        self.shards = wids.ShardListDataset(shards, transformations=[], lru_size=len(shards) + 1, localname=str)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> Any:
        sample = self.shards[number]
        if self.kind == "clips":
            return clip(sample[".mp4"].read(), sample[".json"].read())
        if self.kind == "blocks":
            return block(sample[".npy"].read())
        return split_documents(sample[".npy"].read(), sample[".json"].read())


def stream(folder: Path, kind: str, workers: int, shuffle: bool) -> Iterator[dict[str, Any]]:
    samples: Any = _Samples(folder, kind)
    batch = MEMBERS_PER_BATCH if kind == "documents" else BATCH[kind]
    loader = DataLoader(
        samples,
        batch,
        sampler=wids.ChunkedSampler(samples, chunksize=2000, shuffle=True) if shuffle else None,
        num_workers=workers,
        collate_fn=collate_members if kind == "documents" else COLLATE[kind],
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def resume(folder: Path, consumed: int, batch: int) -> dict[str, Any]:
    """It has no state; a user can draw the sampler again and skip its numbers, which reads nothing."""
    begin = time.perf_counter()
    samples: Any = _Samples(folder, "blocks")
    order = list(wids.ChunkedSampler(samples, chunksize=2000, shuffle=True))
    rest = DataLoader(samples, batch, sampler=order[consumed:], collate_fn=COLLATE["blocks"])
    next(iter(rest))
    return {"seconds": time.perf_counter() - begin, "state_bytes": 0, "how": "no state: sampler drawn again by hand"}
