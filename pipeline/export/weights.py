"""The weight files of an export: planned as a whole, then written one after another, each finished one for good."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.export.entry import Entry
from pipeline.export.journal import Journal
from pipeline.export.mapped import MappedFiles
from pipeline.export.safetensors_file import PlannedFile, index_of, write_file

logger = logging.getLogger(__name__)

Show = Callable[[int, int, str, int], None]
"""Called with the MB done, the MB in all, a note, and how many of those done an interrupted export did."""

_MB = 10**6
_SMALL_FILES_BYTES = 16 * _MB
"""Room left for what is not weights: tokenizer, cards."""


@dataclass(frozen=True, slots=True)
class Weights:
    """All weight files of an export."""

    models: list[PlannedFile]
    others: list[PlannedFile]
    """Heads and adapters, which have no index."""

    @property
    def files(self) -> list[PlannedFile]:
        return [*self.models, *self.others]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for file in self.files)

    @property
    def tensors(self) -> int:
        """How many there are."""
        return sum(len(file.entries) for file in self.files)

    def described(self) -> list[Any]:
        """Everything that decides where each byte goes."""
        return [[file.name, [[e.name, list(e.shape), str(e.dtype)] for e in file.entries]] for file in self.files]

    def missing(self, journal: Journal) -> list[PlannedFile]:
        """Files still to be written."""
        return [file for file in self.files if file.name not in journal.files]


def check_room(weights: Weights, journal: Journal) -> None:
    """Say how large the result will be, and refuse a disk that cannot hold what is still to be written.

    Raises:
        CheckpointError: it cannot.
    """
    disk = journal.folder.parent
    free, needed = shutil.disk_usage(disk).free, sum(file.size for file in weights.missing(journal))
    logger.info(
        "%d tensors, %.3f GB in %d files, %.3f GB of them still to be written; the disk has %.1f GB free",
        weights.tensors, weights.size / 1e9, len(weights.files), needed / 1e9, free / 1e9,
    )  # fmt: skip
    if free < needed + _SMALL_FILES_BYTES:
        raise CheckpointError(
            f"the export needs {needed / 1e9:.3f} GB, but the disk of {disk} has {free / 1e9:.3f} GB free; free space, "
            "or give another --out"
        )


def write_weights(weights: Weights, journal: Journal, mapped: MappedFiles, show: Show) -> None:
    """Write every file that the journal does not hold, and the index.

    Raises:
        OSError: one could not be written.
    """
    folder, missing = journal.folder, weights.missing(journal)
    progress = _Progress(weights, missing, show)
    for file in missing:
        part = folder / f"{file.name}.part"

        def written(entry: Entry) -> None:
            mapped.read(entry.size)
            progress.wrote(entry)

        sha256 = write_file(part, file, written)
        os.replace(part, folder / file.name)
        journal.add(file.name, sha256)
    index = index_of(weights.models)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


class _Progress:
    """Tensors and bytes written so far."""

    def __init__(self, weights: Weights, missing: Sequence[PlannedFile], show: Show) -> None:
        self.show, self.total, self.tensors = show, weights.size, weights.tensors
        self.done = self.before = self.total - sum(file.size for file in missing)
        self.done_tensors = self.tensors - sum(len(file.entries) for file in missing)

    def wrote(self, entry: Entry) -> None:
        self.done += entry.size
        self.done_tensors += 1
        last = self.done_tensors == self.tensors
        total = max(1, self.total // _MB)
        done = total if last else min(self.done // _MB, total - 1)  # headers are bytes of no tensor
        self.show(done, total, f"MB, {self.done_tensors}/{self.tensors} tensors", min(self.before // _MB, done))
