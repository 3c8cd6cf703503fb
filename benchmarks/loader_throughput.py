"""Samples per CPU-second of the loader against plain ``webdataset``, reading the same tars in the same run.

    python benchmarks/loader_throughput.py [--quick] [--out FILE]

CPU time (user + system) of the main process and all workers is counted, because a training node has few cores to
spare per device and wall time on a shared machine says little. Both sides shuffle and deliver the same tensors:

* video: bytes and text of a clip, batches of 8 (nothing is decoded: that costs the same on both sides).
* text: documents packed into blocks of 1024 tokens, batches of 32 blocks; in two layouts, one document per sample (how
  webdataset is commonly used) and 256 documents per array member (how this project stores text).

webdataset checks no checksums. Ours is measured without (the same work) and with them (the default).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset as wds
from receipt import Claim, write_receipt
from torch.utils.data import DataLoader

from shards.index import fingerprint, read_index, rows_to_table, write_index
from shards.loader import LoaderOptions, StepLoader
from shards.packing import Elements
from shards.plan import Plan, PlanOptions, Source
from shards.reader import Reader
from shards.schema import IndexRow, Manifest, Segment
from shards.video import VideoInfo
from shards.writer import TarWriter, add_documents, add_video

CLIPS_PER_BATCH, BLOCKS_PER_BATCH, BLOCK_TOKENS, DOCUMENTS_PER_SHARD, CLIPS_PER_SHARD = 8, 32, 1024, 8192, 200
TARGET = 2.0


# -- the tars --------------------------------------------------------------------------------------------------------
def make_videos(folder: Path, count: int, seed: int = 0) -> Path:
    """Clips of 200 +- 40 KB of random bytes with their json."""
    random = np.random.default_rng(seed)
    groups = []
    for first in range(0, count, CLIPS_PER_SHARD):
        group = []
        for number in range(first, min(first + CLIPS_PER_SHARD, count)):
            size = int(np.clip(random.normal(200_000, 40_000), 20_000, None))
            group.append((_segment(number), random.bytes(size)))
        groups.append(group)
    info = VideoInfo(100, 25.0, 256, 256, 4.0, "h264")
    return _write(
        folder, "video", groups, lambda tar, group: [add_video(tar, segment, data, info) for segment, data in group]
    )


def make_texts(folder: Path, count: int, per_member: int, seed: int = 0) -> Path:
    """Sentences of 28 +- 12 tokens, as subtitle corpora have them."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.normal(28, 12, count), 3, 200).astype(int)
    documents = [random.integers(0, 60_000, length).astype("<u2") for length in lengths]

    def add(tar: TarWriter, numbers: range) -> list[IndexRow]:
        rows = []
        for first in range(numbers.start, numbers.stop, per_member):
            part = range(first, min(first + per_member, numbers.stop))
            rows += add_documents(tar, f"{first:08d}", [_segment(n) for n in part], [documents[n] for n in part])
        return rows

    groups = [range(n, min(n + DOCUMENTS_PER_SHARD, count)) for n in range(0, count, DOCUMENTS_PER_SHARD)]
    return _write(folder, "text", groups, add)


def _segment(number: int) -> Segment:
    return Segment("bench", f"{number:08d}", "train", f"ein kurzer satz mit der nummer {number}", language="de")


def _write(folder: Path, kind: Any, groups: list[Any], add: Callable[[TarWriter, Any], list[IndexRow]]) -> Path:
    folder.mkdir(parents=True)
    rows: list[IndexRow] = []
    shards = []
    for number, group in enumerate(groups):
        with TarWriter(folder / f"train-{number:06d}.tar") as tar:
            made = add(tar, group)
        rows += made
        shards.append({"name": tar.path.name, "samples": len(made), "size": tar.size, "sha256": tar.digest.hexdigest()})
    table = rows_to_table(rows)
    manifest = Manifest(kind, shards=shards, splits={"train": len(rows)}, fingerprint=fingerprint(shards, table))
    write_index(folder, table, manifest)
    return folder


# -- ours ------------------------------------------------------------------------------------------------------------
def fetch_clip(reader: Reader, item: Elements) -> list[tuple[bytes, str]]:
    return [(reader.payload(int(s)), reader.plan.row(int(s)).text) for s in item["sample"]]


def fetch_documents(reader: Reader, item: Elements) -> list[np.ndarray]:
    return list(reader.documents(item))


def collate_clips(items: list[list[tuple[bytes, str]]]) -> dict[str, Any]:
    clips = [clip for item in items for clip in item]
    return {
        "sizes": torch.tensor([len(data) for data, _ in clips]),
        "texts": [t for _, t in clips],
        "count": len(clips),
    }


def collate_blocks(items: list[list[np.ndarray]]) -> dict[str, Any]:
    ids = np.zeros((len(items), BLOCK_TOKENS), dtype=np.int64)
    for row, documents in enumerate(items):
        joined = np.concatenate(documents)
        ids[row, : len(joined)] = joined
    lengths = [len(document) for documents in items for document in documents]
    return {"ids": torch.from_numpy(ids), "lengths": torch.tensor(lengths), "count": len(lengths)}


def ours(folder: Path, kind: str, workers: int, verify: bool) -> Iterator[int]:
    """Samples per batch, for ever."""
    clips = kind == "video"
    options = PlanOptions("clip") if clips else PlanOptions("pack", block_tokens=BLOCK_TOKENS)
    batch = CLIPS_PER_BATCH if clips else BLOCKS_PER_BATCH
    fetch, collate = (fetch_clip, collate_clips) if clips else (fetch_documents, collate_blocks)
    plan = Plan([Source(read_index(folder))], options)
    loader = StepLoader(plan, fetch, collate, LoaderOptions(0, 1, batch, batch, workers, verify=verify))  # type: ignore[arg-type]
    for step in loader:
        yield step.micro_batches[0]["count"]


# -- webdataset ------------------------------------------------------------------------------------------------------
def peer_clips(samples: Iterable[dict[str, Any]]) -> Iterator[tuple[bytes, str]]:
    for sample in samples:
        yield sample["mp4"], json.loads(sample["json"])["text"]


def peer_documents(samples: Iterable[dict[str, Any]]) -> Iterator[np.ndarray]:
    for sample in samples:
        ids = np.load(BytesIO(sample["npy"]))
        for document in json.loads(sample["json"])["documents"]:
            yield ids[document["start"] : document["start"] + document["tokens"]]


def peer_blocks(documents: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The plainest packing: fill a block until the next document does not fit."""
    block: list[np.ndarray] = []
    room = BLOCK_TOKENS
    for document in documents:
        if len(document) > room:
            yield block
            block, room = [], BLOCK_TOKENS
        block.append(document)
        room -= len(document)


def peer(folder: Path, kind: str, workers: int) -> Iterator[int]:
    """Samples per batch, for ever."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    tars = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).repeat()
    if kind == "video":
        pipeline = tars.compose(peer_clips).shuffle(100)
        batches = DataLoader(pipeline, CLIPS_PER_BATCH, num_workers=workers, collate_fn=collate_peer_clips)
    else:
        pipeline = tars.compose(peer_documents).shuffle(1000).compose(peer_blocks)
        batches = DataLoader(pipeline, BLOCKS_PER_BATCH, num_workers=workers, collate_fn=collate_blocks)
    for batch in batches:
        yield batch["count"]


def collate_peer_clips(clips: list[tuple[bytes, str]]) -> dict[str, Any]:
    return collate_clips([[clip] for clip in clips])


# -- measuring -------------------------------------------------------------------------------------------------------
def cpu_seconds() -> float:
    """User and system time so far of this process and its descendants that are alive."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(time_.user + time_.system for time_ in times)


def measure(batches: Iterator[int], samples: int) -> tuple[float, float]:
    """Samples per CPU-second and per second, after a tenth of them as warm-up."""
    warm = 0
    while warm < samples / 10:
        warm += next(batches)
    seen, cpu, wall = 0, cpu_seconds(), time.perf_counter()
    while seen < samples:
        seen += next(batches)
    return seen / (cpu_seconds() - cpu), seen / (time.perf_counter() - wall)


def compare(name: str, folder: Path, samples: int, workers: int, runs: int) -> list[Claim]:
    """Ours with and without checksums and the peer in turn, medians over the runs."""
    kind = name.split()[0]
    sides: dict[str, Callable[[], Iterator[int]]] = {
        "ours": lambda: ours(folder, kind, workers, verify=False),
        "ours, CRC-32 checked": lambda: ours(folder, kind, workers, verify=True),
        "webdataset": lambda: peer(folder, kind, workers),
    }
    figures: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(runs):
        for side, start in sides.items():
            batches = start()
            figures[side].append(measure(batches, samples))
            del batches
            gc.collect()  # ends the workers before the other side is measured
    middle = {side: statistics.median(cpu for cpu, _ in found) for side, found in figures.items()}
    claims = []
    for side in ("ours", "ours, CRC-32 checked"):
        cpu, wall = ({s: [f[n] for f in figures[s]] for s in (side, "webdataset")} for n in (0, 1))
        claims.append(
            Claim(
                f"{name}: {side}, {workers} workers",
                middle[side],
                middle["webdataset"],
                middle[side] / middle["webdataset"],
                TARGET,
                "samples per CPU-second",
                runs,
                detail={"per_cpu_second": cpu, "per_second": wall},
            )
        )
    return claims


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small set, one run each")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    options = parser.parse_args()
    clips, documents, runs = (800, 40_960, 1) if options.quick else (4000, 204_800, 5)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sets = [
            ("video clips", make_videos(folder / "video", clips), clips),
            ("text one document per sample", make_texts(folder / "single", documents, 1), documents),
            ("text 256 documents per member", make_texts(folder / "arrays", documents, 256), documents),
        ]
        for name, path, samples in sets:
            for workers in (0, 2):
                rows += compare(name, path, samples, workers, runs)
    write_receipt(rows, options.out, ["webdataset", "torch", "numpy"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
