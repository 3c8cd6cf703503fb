"""Our worker processes against torch's DataLoader, over the same plan, reader and collate function.

    python benchmarks/loader_pool.py [--quick] [--workload text|features|video] [--out FILE]

Both sides are the same StepLoader; only what carries the requests to the workers and the micro-batches back differs.
DataLoader is measured twice: with one micro-batch per message, and with eight, as ours sends small ones. Each
measurement runs in a process of its own, the sides in turn. CPU time counts the main process and all workers, so other
load on the machine matters little; wall time is in the details, with the seconds to the first batch and the memory
(PSS) of the main process and the workers together.

* ``text``: packs of 1024 tokens of short documents, micro-batches of 8 (16 KB arrive).
* ``features``: 4 clips of 120 x 768 float16 features (750 KB arrive).
* ``video``: 2 clips decoded to 32 frames of 112 x 112 (2.4 MB arrive).

Then a worker is killed: seconds until the main process says so, a minute at most, and what it says; and a loader is
resumed. DataLoader has no timeout here, its default: with one, it looks for dead workers only when that is over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from build_speed import write_video
from loader_data import make_documents, make_features, make_videos
from peers.measure import windows
from receipt import Claim, write_receipt
from torch.utils.data import DataLoader, Dataset

import shards.load.loader
from shards.format.index import read_index
from shards.load.features import read_features
from shards.load.loader import LoaderOptions, StepLoader
from shards.load.reader import Reader
from shards.media.video import VideoOptions, transcode
from shards.order.items import Elements
from shards.order.plan import Plan, PlanOptions, Source
from shards.schema import VideoFile

SIDES = {"ours": 0, "DataLoader": 1, "DataLoader, 8 per message": 8}
"""Micro-batches per message; 0 = our own workers."""
MICRO_BATCH = {"text": 8, "features": 4, "video": 2}
WINDOW = {"text": 2000, "features": 1000, "video": 40}
"""Micro-batches in a window."""
PACK_TOKENS, VIDEO_FRAMES, SIDE_PIXELS = 1024, 75, 112
PATIENCE_SECONDS = 60.0


# -- the work: the same for both sides -------------------------------------------------------------------------------
def fetch(reader: Reader, item: Elements, kind: str) -> list[np.ndarray]:
    if kind == "text":
        return [reader.pack(item).ids]
    samples = item["sample"].tolist()
    if kind == "features":
        return [read_features(reader, sample) for sample in samples]
    return [reader.frames(sample, max_frames=32, size=SIDE_PIXELS) for sample in samples]


def collate(items: list[list[np.ndarray]]) -> dict[str, Any]:
    """Padded to the longest: [B, longest, ...]."""
    arrays = [array for item in items for array in item]
    batch = np.zeros((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    for row, array in zip(batch, arrays, strict=True):
        row[: len(array)] = array
    ids = torch.from_numpy(batch.view(np.int16) if batch.dtype == np.uint16 else batch)
    return {"data": ids, "lengths": torch.tensor([len(array) for array in arrays]), "n": 1, "pid": os.getpid()}


# -- the other side: torch's DataLoader in the place of our workers ----------------------------------------------------
class _Made(Dataset[Any]):
    """Micro-batches by requests."""

    def __init__(self, maker: Any) -> None:
        self.maker = maker

    def __getitem__(self, requests: Any) -> list[Any]:
        return list(self.maker.results(requests))


class _Groups:
    """The requests, several per message."""

    def __init__(self, requests: Iterator[Any], size: int) -> None:
        self.requests, self.size = requests, size

    def __iter__(self) -> Iterator[list[Any]]:
        while group := list(islice(self.requests, self.size)):
            yield group


def _same(results: Any) -> Any:
    return results


def _begin(number: int) -> None:
    del number
    torch.set_num_threads(1)


def torch_stream(maker: Any, requests: Iterator[Any], options: LoaderOptions, per_message: int) -> Iterator[Any]:
    """What ``shards.load.loader`` asks for micro-batches, by torch's DataLoader."""
    settings: dict[str, Any] = {}
    if options.workers:
        shards.load.loader.preload_workers(__name__)
        settings = {"prefetch_factor": options.prefetch, "multiprocessing_context": "forkserver"}
        settings |= {"worker_init_fn": _begin, "timeout": 0}
    groups: Any = _Groups(requests, per_message)
    made = _Made(maker)
    for results in DataLoader(made, None, sampler=groups, num_workers=options.workers, collate_fn=_same, **settings):
        for result in results:
            yield result.unwrap()


# -- one measurement, in a process of its own ------------------------------------------------------------------------
def loader_of(side: str, kind: str, folder: Path, workers: int) -> StepLoader:
    if SIDES[side]:
        stream: Any = partial(torch_stream, per_message=SIDES[side])
        shards.load.loader._Stream = stream
    options = PlanOptions("pack", block_tokens=PACK_TOKENS) if kind == "text" else PlanOptions("clip")
    share = LoaderOptions(0, 1, MICRO_BATCH[kind], MICRO_BATCH[kind], workers)
    return StepLoader(Plan([Source(read_index(folder))], options), partial(fetch, kind=kind), collate, share)


def batches(loader: StepLoader) -> Iterator[dict[str, Any]]:
    for step in loader:
        yield from step.micro_batches


def memory_bytes() -> int:
    """PSS of this process and its children."""
    me = psutil.Process()
    return sum(one.memory_full_info().pss for one in (me, *me.children(recursive=True)))


def throughput(side: str, kind: str, folder: Path, workers: int, window: int) -> dict[str, Any]:
    stream = batches(loader_of(side, kind, folder, workers))
    found = windows(stream, workers, window, runs=2)
    return found | {"pss_bytes": memory_bytes()}


def death(side: str, kind: str, folder: Path) -> dict[str, Any]:
    """A worker is killed: how long until it is said, and how."""
    stream = batches(loader_of(side, kind, folder, 2))
    made_by = {next(stream)["pid"] for _ in range(50)}
    while os.getpid() in made_by or len(made_by) < 2:
        made_by = {next(stream)["pid"] for _ in range(50)}
    os.kill(min(made_by), signal.SIGKILL)
    begin = time.perf_counter()
    try:
        for _ in stream:
            pass
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return {"seconds": time.perf_counter() - begin, "said": said}
    return {}


def resumed(side: str, kind: str, folder: Path) -> dict[str, Any]:
    """Whether a loader that goes on after 40 steps gives what the first one gave."""
    first = loader_of(side, kind, folder, 2)
    digests, state = [], {}
    for number, step in enumerate(islice(first, 60), 1):
        digests.append(hashlib.sha256(step.micro_batches[0]["data"].numpy().tobytes()).hexdigest())
        state = first.state_dict() if number == 40 else state
    again = loader_of(side, kind, folder, 2)
    again.load_state_dict(json.loads(json.dumps(state)))
    found = [step.micro_batches[0]["data"].numpy().tobytes() for step in islice(again, 20)]
    return {"exact": [hashlib.sha256(payload).hexdigest() for payload in found] == digests[40:]}


def ask(what: str, **arguments: Any) -> dict[str, Any]:
    """The answer of a measurement in a new process; none after PATIENCE_SECONDS."""
    command = [sys.executable, __file__, "--measure", json.dumps({"what": what, **arguments})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"seconds": PATIENCE_SECONDS, "said": "nothing"}
    if done.returncode:
        raise SystemExit(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def answer(arguments: dict[str, Any]) -> None:
    what, folder = arguments.pop("what"), Path(arguments.pop("folder"))
    found = {"throughput": throughput, "death": death, "resumed": resumed}[what](folder=folder, **arguments)
    print(json.dumps(found), flush=True)
    os._exit(0)  # no wait for workers


# -- the comparison --------------------------------------------------------------------------------------------------
def make(kind: str, scratch: Path) -> Path:
    if kind == "text":
        return make_documents(scratch / kind, 100_000)
    if kind == "features":
        return make_features(scratch / kind, 2000)
    sources = [write_video(scratch / f"{seed}.mp4", VIDEO_FRAMES, (256, 256), 12, seed) for seed in range(4)]
    payloads = [transcode(VideoFile(path), VideoOptions()) for path in sources]
    return make_videos(scratch / kind, payloads, VIDEO_FRAMES, 400)


def compare(kind: str, folder: Path, workers: int, quick: bool) -> list[Claim]:
    window, runs = WINDOW[kind] // (4 if quick else 1), 2 if quick else 3
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(runs):
        for side in SIDES:
            arguments: dict[str, Any] = {"side": side, "kind": kind, "folder": str(folder), "workers": workers}
            found[side].append(ask("throughput", window=window, **arguments))
    sides = {side: _summary(answers) for side, answers in found.items()}
    ours = sides.pop("ours")
    rows = []
    for side, peer in sides.items():
        rates = ours["per_cpu_second"], peer["per_cpu_second"]
        detail = {"ours": ours, "peer": peer, "wall_ratio": ours["per_second"] / peer["per_second"]}
        name = f"{kind}, {workers} workers: against {side}"
        rows.append(Claim(name, *rates, rates[0] / rates[1], 1.0, "micro-batches per CPU-second", runs, detail=detail))
    return rows


def _summary(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the runs."""
    return {
        "per_cpu_second": 1 / median(value for answer in answers for value in answer["cpu"]),
        "per_second": 1 / median(value for answer in answers for value in answer["wall"]),
        "first_batch_seconds": median(answer["start"]["first_batch"] for answer in answers),
        "start_seconds": median(answer["start"]["seconds"] for answer in answers),
        "start_cpu_seconds": median(answer["start"]["cpu_seconds"] for answer in answers),
        "pss_mib": median(answer["pss_bytes"] for answer in answers) / 2**20,
    }


def behaviour(kind: str, folder: Path) -> list[Claim]:
    """A dead worker, and resuming."""
    rows = []
    dead = {side: ask("death", side=side, kind=kind, folder=str(folder)) for side in SIDES}
    exact = {side: ask("resumed", side=side, kind=kind, folder=str(folder))["exact"] for side in SIDES}
    for side in list(SIDES)[1:]:
        detail = {"ours": dead["ours"]["said"], "peer": dead[side]["said"], "resumed_exactly": exact}
        name = f"{kind}, a worker is killed: until {side} says so"
        numbers = dead["ours"]["seconds"], dead[side]["seconds"], None
        rows.append(Claim(name, *numbers, 1.0, "s", 1, higher_is_better=False, detail=detail))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter windows, two runs")
    parser.add_argument("--workload", choices=sorted(WINDOW), help="only this one")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        answer(options.measure)
    rows: list[Claim] = []
    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        for kind in [options.workload] if options.workload else list(WINDOW):
            folder = make(kind, Path(scratch))
            for workers in (0, 2):
                rows += compare(kind, folder, workers, options.quick)
            if kind == "text":
                rows += behaviour(kind, folder)
            write_receipt(rows, options.out, ["torch", "numpy"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
