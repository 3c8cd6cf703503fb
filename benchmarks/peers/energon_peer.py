"""``megatron-energon``: reads our tars with an index of its own beside them (``energon prepare``)."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.energon import (
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    WorkerConfig,
    cooker,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from workloads import (
    BATCH,
    BUFFER,
    MEMBERS_PER_BATCH,
    block,
    clip,
    collate_blocks,
    collate_clips,
    collate_members,
    link,
    split_documents,
)

SLICE = 100  # samples read one after another before another slice is chosen: its documentation's example


def prepare(source: Path, out: Path, kind: str) -> None:
    link(source, out)
    energon = Path(sys.executable).with_name("energon")
    options = ["--non-interactive", "--no-progress", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    subprocess.run([str(energon), "prepare", *options, str(out)], check=True, stdout=sys.stderr)


def _decoded(sample: CrudeSample) -> Any:
    if "mp4" in sample:
        return clip(sample["mp4"], sample["json"])
    if "json" in sample:
        return split_documents(sample["npy"], sample["json"])
    return block(sample["npy"])


@stateless
@cooker
def _cook(sample: CrudeSample) -> Any:
    return sample


class _Encoder(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Our decoding and batches; its own decoder is off, so members arrive as bytes."""

    cookers = [Cooker(_cook)]  # noqa: RUF012
    decoder = None

    @stateless
    def encode_sample(self, sample: Any) -> Any:
        return sample

    @stateless
    def batch(self, samples: list[Any]) -> Any:
        items = [_decoded(sample) for sample in samples]
        collate: Any = collate_clips if "mp4" in samples[0] else collate_members if "json" in samples[0] else None
        return (collate or collate_blocks)(items)


def _loader(folder: Path, kind: str, workers: int, shuffle: bool, batch: int) -> Any:
    samples = get_train_dataset(
        folder,
        batch_size=batch,
        shuffle_buffer_size=BUFFER[kind] if shuffle else None,
        max_samples_per_sequence=SLICE if shuffle else None,
        shuffle_over_epochs_multiplier=1 if shuffle else None,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        task_encoder=_Encoder(),
        repeat=True,
        parallel_shard_iters=None if shuffle else 1,
    )
    return get_savable_loader(samples)


def stream(folder: Path, kind: str, workers: int, shuffle: bool) -> Iterator[dict[str, Any]]:
    batch = MEMBERS_PER_BATCH if kind == "documents" else BATCH[kind]
    while True:
        yield from _loader(folder, kind, workers, shuffle, batch)


def resume(folder: Path, consumed: int, batch: int) -> dict[str, Any]:
    before = _loader(folder, "blocks", 0, True, batch)
    batches = iter(before)
    for _ in range(consumed // batch):
        next(batches)
    state = before.save_state_rank()
    begin = time.perf_counter()
    loader = _loader(folder, "blocks", 0, True, batch)
    loader.restore_state_rank(state)
    next(iter(loader))
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "state_bytes": len(pickle.dumps(state)), "how": "state restored"}
