"""Plain ``webdataset``: reads our tars as they are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset as wds
from torch.utils.data import DataLoader
from workloads import BATCH, BUFFER, COLLATE, block, clip, link, packed, split_documents


def prepare(source: Path, out: Path, kind: str) -> None:
    """The tars are its format."""
    link(source, out)


def _decoded(samples: Iterable[dict[str, Any]], kind: str) -> Iterator[Any]:
    for sample in samples:
        if kind == "clips":
            yield clip(sample["mp4"], sample["json"])
        elif kind == "blocks":
            yield block(sample["npy"])
        else:
            yield from split_documents(sample["npy"], sample["json"])


def _pipeline(folder: Path, kind: str, shuffle: bool) -> Any:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    found = wds.WebDataset(urls, shardshuffle=len(urls) if shuffle else False, empty_check=False).repeat()
    found = found.compose(partial(_decoded, kind=kind))
    if shuffle:
        found = found.shuffle(BUFFER[kind])
    return found.compose(packed) if kind == "documents" else found


def stream(folder: Path, kind: str, workers: int, shuffle: bool) -> Iterator[dict[str, Any]]:
    pipeline = _pipeline(folder, kind, shuffle)
    yield from DataLoader(pipeline, BATCH[kind], num_workers=workers, collate_fn=COLLATE[kind])


def resume(folder: Path, consumed: int, batch: int) -> dict[str, Any]:
    """It has no state: all that can be done is to read and drop what was seen."""
    begin = time.perf_counter()
    batches = iter(DataLoader(_pipeline(folder, "blocks", True), batch, collate_fn=COLLATE["blocks"]))
    next(islice(batches, consumed // batch, None))
    return {"seconds": time.perf_counter() - begin, "state_bytes": 0, "how": "reads and drops what was seen"}
