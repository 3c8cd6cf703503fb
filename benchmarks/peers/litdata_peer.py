"""``litdata``: its own format, uncompressed, 64 MiB chunks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litdata
from torch.utils.data import DataLoader, IterableDataset
from workloads import BATCH, COLLATE, decoded, packed, records


def _records_of(source: str, kind: str) -> Iterator[dict[str, bytes]]:
    yield from records(Path(source), kind)


def prepare(source: Path, out: Path, kind: str) -> None:
    litdata.optimize(
        fn=partial(_records_of, kind=kind),
        inputs=[str(source)],
        output_dir=str(out),
        num_workers=1,
        chunk_bytes="64MB",
        verbose=False,
    )


class _Decoded(litdata.StreamingDataset):
    """Its dataset with our decoding."""

    kind = "blocks"

    def __getitem__(self, number: Any) -> Any:
        return decoded(super().__getitem__(number), self.kind)


class _Packs(IterableDataset[Any]):
    """Documents of one worker, packed."""

    def __init__(self, documents: Any) -> None:
        self.documents = documents

    def __iter__(self) -> Iterator[Any]:
        return packed(iter(self.documents))


def _loader(folder: Path, kind: str, workers: int, shuffle: bool, batch: int) -> Any:
    samples = _Decoded(str(folder), shuffle=shuffle)
    samples.kind = kind
    settings: dict[str, Any] = {"num_workers": workers, "collate_fn": COLLATE[kind], "persistent_workers": workers > 0}
    if kind == "documents":
        return DataLoader(_Packs(samples), batch, **settings)
    return litdata.StreamingDataLoader(samples, batch_size=batch, **settings)


def stream(folder: Path, kind: str, workers: int, shuffle: bool) -> Iterator[dict[str, Any]]:
    loader = _loader(folder, kind, workers, shuffle, BATCH[kind])
    while True:
        yield from loader


def resume(folder: Path, consumed: int, batch: int) -> dict[str, Any]:
    before = _loader(folder, "blocks", 0, True, batch)
    batches = iter(before)
    for _ in range(consumed // batch):
        next(batches)
    state = before.state_dict()
    begin = time.perf_counter()
    loader = _loader(folder, "blocks", 0, True, batch)
    loader.load_state_dict(state)
    next(iter(loader))
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "state_bytes": len(json.dumps(state)), "how": "state restored"}
