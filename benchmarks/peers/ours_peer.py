"""This project's loader, with checksums (its default) and every damaged sample handled."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from workloads import BATCH, BLOCK_TOKENS, PACK_TOKENS, collate_clips

from shards.format.index import read_index
from shards.load.documents import Pack
from shards.load.loader import LoaderOptions, StepLoader
from shards.load.reader import Reader
from shards.order.items import Elements
from shards.order.plan import Plan, PlanOptions, Source


def prepare(source: Path, out: Path, kind: str) -> None:
    """The tars are ours; ``out`` becomes another name for them."""
    out.symlink_to(source.resolve(), target_is_directory=True)


def fetch_clip(reader: Reader, item: Elements) -> list[Any]:
    """Bytes of one clip, checked, and what its json says, which the index holds."""
    return [(len(reader.payload(sample)), reader.row(sample)) for sample in item["sample"].tolist()]


def fetch_documents(reader: Reader, item: Elements) -> list[Pack]:
    return [reader.pack(item)]


def flat_clips(items: list[list[Any]]) -> dict[str, Any]:
    return collate_clips([clip for item in items for clip in item])


def collate_texts(items: list[list[Pack]], tokens: int) -> dict[str, Any]:
    """What ``collate_packs`` makes, and ``collate_blocks`` without the lengths."""
    packs = [pack for item in items for pack in item]
    lengths = np.concatenate([pack.lengths for pack in packs])
    if int(lengths.sum()) == len(packs) * tokens:
        ids = np.concatenate([pack.ids for pack in packs]).reshape(-1, tokens)
    else:
        ids = np.empty((len(packs), tokens), dtype="<u2")
        for row, pack in zip(ids, packs, strict=True):
            row[: len(pack.ids)] = pack.ids
            row[len(pack.ids) :] = 0
    return {
        "ids": torch.from_numpy(ids.view(np.int16)),
        "lengths": torch.from_numpy(lengths),
        "n": len(lengths),
        "pid": os.getpid(),
    }


def _plan(folder: Path, kind: str, shuffle: bool) -> Plan:
    blocks = BLOCK_TOKENS if kind == "blocks" else PACK_TOKENS
    options = (
        PlanOptions("clip", shuffle=shuffle)
        if kind == "clips"
        else PlanOptions("pack", block_tokens=blocks, shuffle=shuffle)
    )
    return Plan([Source(read_index(folder))], options)


def _loader(plan: Plan, kind: str, workers: int, batch: int, verify: bool = True) -> StepLoader:
    fetch = fetch_clip if kind == "clips" else fetch_documents
    tokens = BLOCK_TOKENS if kind == "blocks" else PACK_TOKENS
    collate: Any = flat_clips if kind == "clips" else partial(collate_texts, tokens=tokens)
    return StepLoader(plan, fetch, collate, LoaderOptions(0, 1, batch, batch, workers, verify=verify))


def stream(folder: Path, kind: str, workers: int, shuffle: bool, verify: bool = True) -> Iterator[dict[str, Any]]:
    for step in _loader(_plan(folder, kind, shuffle), kind, workers, BATCH[kind], verify):
        yield step.micro_batches[0]


def resume(folder: Path, consumed: int, batch: int) -> dict[str, Any]:
    plan = _plan(folder, "blocks", True)
    state = plan.state(plan.advance(_loader(plan, "blocks", 0, batch).cursor, consumed))
    begin = time.perf_counter()
    loader = _loader(_plan(folder, "blocks", True), "blocks", 0, batch)
    loader.load_state_dict(state)
    next(iter(loader))
    return {"seconds": time.perf_counter() - begin, "state_bytes": len(json.dumps(state)), "how": "state restored"}
