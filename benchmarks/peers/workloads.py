"""What every side delivers, whatever it reads it from. Needs only NumPy and torch.

* ``clips``: batches of 8; the bytes are read and touched where they would be decoded (in the worker), their sizes and
  what their json says arrive in the main process.
* ``blocks``: batches of 32 blocks of 2048 tokens, one block per member; a tensor [32, 2048] arrives.
* ``documents``: short documents packed into blocks of 1024 tokens, batches of 32 blocks; a tensor [32, 1024] and the
  lengths arrive.

Every batch says how many samples it holds (``n``) and which process collated it (``pid``).
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

CLIPS_PER_BATCH, BLOCKS_PER_BATCH, BLOCK_TOKENS, PACK_TOKENS = 8, 32, 2048, 1024
MEMBERS_PER_BATCH = 4
"""Where a side batches members, each of 256 documents: about 28 blocks."""
BATCH = {"clips": CLIPS_PER_BATCH, "blocks": BLOCKS_PER_BATCH, "documents": BLOCKS_PER_BATCH}
BUFFER = {"clips": 100, "blocks": 1000, "documents": 1000}
"""Shuffle buffers of the sides that have one: small enough to be filled quickly, as their users choose them."""

Clip = tuple[int, dict[str, Any]]


def clip(payload: bytes, meta: bytes) -> Clip:
    """Size and parsed json of one clip."""
    return len(payload), json.loads(meta)


def block(payload: bytes) -> np.ndarray:
    """The tokens at the end of an ``.npy`` payload; its header is skipped, which is faster than ``np.load``."""
    return np.frombuffer(payload, "<u2", offset=len(payload) - 2 * BLOCK_TOKENS)


def split_documents(npy: bytes, meta: bytes) -> list[np.ndarray]:
    """The documents of one member of our text layout."""
    ids = np.load(io.BytesIO(npy))
    return [ids[d["start"] : d["start"] + d["tokens"]] for d in json.loads(meta)["documents"]]


def packed(documents: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The plainest packing: fill a block until the next document does not fit."""
    pack: list[np.ndarray] = []
    room = PACK_TOKENS
    for document in documents:
        if len(document) > room:
            yield pack
            pack, room = [], PACK_TOKENS
        pack.append(document)
        room -= len(document)
    if pack:
        yield pack


def collate_clips(clips: list[Clip]) -> dict[str, Any]:
    sizes = torch.tensor([size for size, _ in clips])
    return {"sizes": sizes, "meta": [meta for _, meta in clips], "n": len(clips), "pid": os.getpid()}


def collate_blocks(blocks: list[np.ndarray]) -> dict[str, Any]:
    return {"ids": torch.from_numpy(np.stack(blocks).view(np.int16)), "n": len(blocks), "pid": os.getpid()}


def collate_packs(packs: list[list[np.ndarray]]) -> dict[str, Any]:
    documents = list(chain.from_iterable(packs))
    lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    used = np.asarray([sum(map(len, pack)) for pack in packs])
    ids = np.zeros((len(packs), PACK_TOKENS), dtype=np.int16)
    ids[np.arange(PACK_TOKENS) < used[:, None]] = np.concatenate(documents).view(np.int16)
    return {"ids": torch.from_numpy(ids), "lengths": torch.from_numpy(lengths), "n": len(lengths), "pid": os.getpid()}


def collate_members(members: list[list[np.ndarray]]) -> dict[str, Any]:
    """Members of documents, packed inside the batch."""
    return collate_packs(list(packed(document for documents in members for document in documents)))


COLLATE = {"clips": collate_clips, "blocks": collate_blocks, "documents": collate_packs}


def link(source: Path, out: Path) -> list[Path]:
    """The tars of ``source`` under ``out`` without a copy, for the sides that read them as they are."""
    out.mkdir(parents=True)
    for path in sorted(source.glob("*.tar")):
        (out / path.name).symlink_to(path.resolve())
    return sorted(out.glob("*.tar"))


def tar_samples(source: Path) -> Iterator[dict[str, bytes]]:
    """Extension -> payload of every sample of a tar or of a folder of them, for conversions."""
    for path in sorted(source.glob("*.tar")) if source.is_dir() else [source]:
        sample: dict[str, bytes] = {}
        last = ""
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if key != last and sample:
                    yield sample
                    sample = {}
                handle = tar.extractfile(member)
                assert handle is not None
                sample[kind], last = handle.read(), key
        if sample:
            yield sample


def records(source: Path, kind: str) -> Iterator[dict[str, bytes]]:
    """What a side with a format of its own stores per sample: clips with their json, or the tokens of one text."""
    for sample in tar_samples(source):
        if kind == "clips":
            yield {"mp4": sample["mp4"], "json": sample["json"]}
        elif kind == "blocks":
            yield {"ids": block(sample["npy"]).tobytes()}
        else:
            for document in split_documents(sample["npy"], sample["json"]):
                yield {"ids": document.tobytes()}


def decoded(record: dict[str, bytes], kind: str) -> Any:
    """One stored record as the collate functions take it."""
    if kind == "clips":
        return clip(record["mp4"], bytes(record["json"]))
    return np.frombuffer(record["ids"], "<u2")
