"""What planning costs from a hundred thousand to ten million samples: start, resume, chunks, stalls, memory.

    python benchmarks/plan_scale.py [--quick] [--out FILE] [--scratch FOLDER]

The indexes are synthetic (no shards: a plan never reads any); every kind is measured in a process of its own. The
first opening of a large index, which makes its memory-mapped copy, is a claim of its own; all others find it made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from receipt import Claim, write_receipt

from shards.format.index import INDEX_NAME, index_schema, open_index, write_index
from shards.order.plan import Cursor, Plan, PlanOptions, Source
from shards.schema import Manifest

GLOBAL_BATCH, SAMPLES_PER_SHARD, STEP_SECONDS, BORDERS = 256, 1000, 0.1, 3
OPTIONS = {
    "pack": PlanOptions("pack", block_tokens=2048),
    "clip": PlanOptions("clip", length_window=512, unique_texts_window=GLOBAL_BATCH),
    "group": PlanOptions("group", frame_budget=2048, length_window=512, unique_texts_window=GLOBAL_BATCH),
    "sequence": PlanOptions("sequence", block_tokens=2048, frames_per_token=4, tokenizer="t" * 16, max_frames=512),
}


# -- the index -------------------------------------------------------------------------------------------------------
def make_index(folder: Path, kind: str, samples: int) -> Path:
    """The index of a shard set of subtitles: every tenth text is one of a thousand frequent ones."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(samples)
    partial = folder / "partial.parquet"
    with pq.ParquetWriter(partial, index_schema(), compression="zstd") as writer:
        for first in range(0, samples, 1 << 16):
            writer.write_batch(_batch(kind, np.arange(first, min(first + (1 << 16), samples)), random))
    digest = hashlib.sha256(f"{kind} {samples}".encode()).hexdigest()
    options = {"text_tokenizer": "t" * 16} if kind == "video" else {}
    manifest = Manifest(kind, splits={"train": samples}, options=options, fingerprint=digest)  # type: ignore[arg-type]
    write_index(folder, index_schema().empty_table(), manifest)
    partial.rename(folder / INDEX_NAME)
    return folder


def _batch(kind: str, numbers: np.ndarray, random: np.random.Generator) -> pa.RecordBatch:
    count = len(numbers)
    ids = pa.array(numbers).cast(pa.string())
    frequent = np.where(random.random(count) < 0.1, random.integers(0, 1000, count), numbers + 1000)
    frames = np.clip(random.lognormal(np.log(100), 0.6, count), 8, 1000) if kind == "video" else np.zeros(count)
    tokens = np.clip(random.lognormal(np.log(30), 0.5, count), 3, 400)
    values: dict[str, Any] = {
        "shard": [f"train-{number:06d}.tar" for number in numbers // SAMPLES_PER_SHARD],
        "key": ids, "sample_id": ids, "offset": numbers % SAMPLES_PER_SHARD * 200_000 + 512,
        "size": random.integers(100_000, 190_000, count), "crc32": random.integers(0, 2**32, count),
        "text": pa.array([f"a sentence of a subtitle file, as long as such sentences are: {n}" for n in frequent]),
        "text_hash": frequent.astype(np.int64) * 0x9E3779B9, "frames": frames, "tokens": tokens,
        "split": ["train"] * count, "corpus": ["synthetic"] * count,
    }  # fmt: skip
    arrays = []
    for field in index_schema():
        found = values.get(field.name, [""] * count if field.type == pa.string() else np.zeros(count))
        array = found if isinstance(found, pa.Array) else pa.array(found)
        arrays.append(array.cast(field.type, safe=False))
    return pa.record_batch(arrays, schema=index_schema())


# -- one kind, in a process of its own -------------------------------------------------------------------------------
def measure(folder: Path, kind: str) -> dict[str, float]:
    """All figures of one plan."""
    before = _anonymous_mib()
    begin = time.perf_counter()
    plan = Plan([Source(open_index(folder))], OPTIONS[kind])
    opened = time.perf_counter()
    plan.items(Cursor(), GLOBAL_BATCH)
    first = time.perf_counter()
    late = Cursor(0, plan.chunks.count(0) * 9 // 10, 100)
    other = Plan(plan.sources, plan.options)
    resumed = time.perf_counter()
    other.items(late, GLOBAL_BATCH)
    found = {"open": opened - begin, "first": first - opened, "resume": time.perf_counter() - resumed}
    times, samples = [], 0
    other = Plan(plan.sources, plan.options)
    for chunk in range(min(plan.chunks.count(0), 4)):
        start = time.process_time()
        other.chunks.make(0, chunk)
        times.append(time.process_time() - start)
        samples += sum(end - begin for begin, end in plan.chunks.ranges(0, chunk))
    found |= {"us_per_sample": sum(times) / samples * 1e6, "chunk": max(times), "stall": _stall(plan)}
    found["main_mib"] = _anonymous_mib() - before
    found["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**found, "worker_mib": _workers(plan), "samples": len(plan.samples)}


def _stall(plan: Plan) -> float:
    """Longest wait for the items of a step around some chunk borders, from twenty steps before each on.

    A step computes for a tenth of a second and holds the interpreter all the time, which is worse than training does.
    """
    longest, place = 0.0, Cursor()
    for _ in range(BORDERS):
        made = plan.advance(place, 0)
        items = len(plan.chunks.make(made.epoch, made.chunk))
        cursor = plan.advance(made, max(items - 20 * GLOBAL_BATCH, 0))
        plan.items(cursor, 1)  # begins the next chunk; what the first items of all cost is a claim of its own
        while (cursor.epoch, cursor.chunk) == (made.epoch, made.chunk):
            begin = time.perf_counter()
            _, cursor = plan.items(cursor, GLOBAL_BATCH)
            longest = max(longest, time.perf_counter() - begin)
            until = time.perf_counter() + STEP_SECONDS
            while time.perf_counter() < until:
                hash(cursor)
        place = cursor
    return longest


def _workers(plan: Plan) -> float:
    """Private memory (USS) that the plan adds to each of two workers that look at samples all over it, MiB."""
    context = multiprocessing.get_context("spawn")
    together, found = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_serve, args=(pickle.dumps(plan), together, found)) for _ in range(2)]
    for worker in workers:
        worker.start()
    uss = [float(found.get()) for _ in workers]
    for worker in workers:
        worker.join()
    return max(uss)


def _serve(payload: bytes, together: Any, found: Any) -> None:
    before = psutil.Process().memory_full_info().uss
    plan = pickle.loads(payload)
    for sample in range(0, len(plan.samples), max(len(plan.samples) // 2000, 1)):
        plan.samples.row(sample)
        plan.samples.columns["offset"][sample]
    together.wait()
    uss = psutil.Process().memory_full_info().uss
    together.wait()  # pages are shared only as long as the other one is there
    found.put((uss - before) / 2**20)


def _anonymous_mib() -> float:
    """Memory of this process that is not file pages, which the system takes back when it needs them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


# -- the claims ------------------------------------------------------------------------------------------------------
def claims(kind: str, found: dict[str, float]) -> list[Claim]:
    """The figures of one plan as claims."""
    million = f"{found['samples'] / 1e6:g} M samples"
    rows = [
        ("open and plan", "open", 2.0, "s"),
        ("first global batch", "first", 0.5, "s"),
        ("resume at 90 % of the epoch", "resume", 0.2, "s"),
        ("longest wait at chunk borders", "stall", 0.05, "s"),
        ("planning a chunk", "us_per_sample", 2.0, "us per sample"),
        ("memory of the main process", "main_mib", 200.0, "MiB"),
        ("private memory per worker", "worker_mib", 100.0, "MiB"),
    ]
    return [
        Claim(f"{kind}, {million}: {text}", found[name], None, None, target, unit, 1, False, detail=found)
        for text, name, target, unit in rows
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundred thousand samples only")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    parser.add_argument("--scratch", type=Path, help="folder for the indexes (about 6 GB without --quick)")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1])))
        return 0
    rows: list[Claim] = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for samples in (100_000,) if options.quick else (100_000, 1_000_000, 10_000_000):
            for stored, kinds in (("text", ("pack",)), ("video", ("clip", "group", "sequence"))):
                folder = make_index(Path(scratch) / f"{stored}-{samples}", stored, samples)
                begin = time.perf_counter()
                open_index(folder)
                detail = {"index_mib": (folder / INDEX_NAME).stat().st_size / 2**20}
                name = f"{stored}, {samples / 1e6:g} M samples: first opening"
                seconds = time.perf_counter() - begin
                rows.append(Claim(name, seconds, None, None, 60.0, "s", 1, False, detail=detail))
                for kind in kinds:
                    command = [sys.executable, __file__, "--measure", str(folder), kind]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    rows += claims(kind, json.loads(done.stdout))
    write_receipt(rows, options.out, ["numpy", "pyarrow"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
