"""``mosaicml-streaming``: its own format (MDS), uncompressed, no hashes: its fastest settings."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from workloads import BATCH, COLLATE, decoded, packed, records


def _without_torchvision() -> None:
    """It imports torchvision, whose PyPI wheel does not load beside a CPU build of torch, for three image classes."""
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    modules["torchvision.datasets"].VisionDataset = object
    modules["torchvision.transforms.functional"].to_tensor = None
    sys.modules.update(modules)


_without_torchvision()

from streaming import MDSWriter, StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402


def prepare(source: Path, out: Path, kind: str) -> None:
    names = ("mp4", "json") if kind == "clips" else ("ids",)
    with MDSWriter(out=str(out), columns=dict.fromkeys(names, "bytes"), size_limit=1 << 26) as writer:
        for record in records(source, kind):
            writer.write(record)


class _Decoded(StreamingDataset):
    """Its dataset with our decoding."""

    kind = "blocks"

    def __getitem__(self, number: int) -> Any:
        return decoded(super().__getitem__(number), self.kind)


class _Packs(IterableDataset[Any]):
    """Documents of one worker, packed."""

    def __init__(self, documents: Any) -> None:
        self.documents = documents

    def __iter__(self) -> Iterator[Any]:
        return packed(iter(self.documents))


def _open(folder: Path, kind: str, shuffle: bool, batch: int) -> _Decoded:
    clean_stale_shared_memory()  # what an interrupted run left behind stops the next one
    found = _Decoded(local=str(folder), shuffle=shuffle, batch_size=batch)
    found.kind = kind
    return found


def stream(folder: Path, kind: str, workers: int, shuffle: bool) -> Iterator[dict[str, Any]]:
    samples: Any = _open(folder, kind, shuffle, BATCH[kind])
    data = _Packs(samples) if kind == "documents" else samples
    loader = DataLoader(
        data, BATCH[kind], num_workers=workers, collate_fn=COLLATE[kind], persistent_workers=workers > 0
    )
    while True:
        yield from loader


def resume(folder: Path, consumed: int, batch: int) -> dict[str, Any]:
    before = _open(folder, "blocks", True, batch)
    state = before.state_dict(consumed, from_beginning=True)
    del before
    begin = time.perf_counter()
    samples = _open(folder, "blocks", True, batch)
    samples.load_state_dict(state)
    next(iter(DataLoader(samples, batch, collate_fn=COLLATE["blocks"])))
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "state_bytes": len(json.dumps(state)), "how": "state restored"}
