"""The files that a recipe's pretrained parts are loaded from, and digests of them.

A checkpoint leaves frozen parts out; its export takes them from these files again. The digests tell whether they are
still the files that the run loaded.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from pipeline.config.schema import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.models.exported import HEADS, Export, init_folders, part_of
from pipeline.models.weight_files import files_of

Digests = dict[str, dict[str, dict[str, Any]]]
"""Part (`llm`, `visual`; of `model.init_from` also `connector`, `heads`) -> file name -> size in bytes and sha256."""


def source_folders(model: ModelConfig, names: Iterable[str]) -> dict[str, Path]:
    """Part -> the folder its pretrained weights come from, of the parts that have any of these parameters.

    A part with new weights (`tiny`) has none. Hub ids mean their folder in the local cache. An export that
    `model.init_from` names for a part comes before the part's own path.
    """
    parts = {part_of(name) for name in names}
    initial = init_folders(model) if parts else {}
    visual = model.visual
    backbone = None if visual is None or visual.backbone is None else visual.backbone.path
    paths = {
        "llm": None if model.llm is None else model.llm.path,
        "visual": None if visual is None else visual.path or backbone,
    }
    loaded = {part: _folder(path) for part, path in paths.items() if path is not None}
    return {part: folder for part, folder in (loaded | initial).items() if part in parts}


def source_prefixes(model: ModelConfig) -> tuple[str, ...]:
    """Beginnings of the names of all parameters whose weights come from a folder."""
    visual = model.visual
    backbone = None if visual is None or visual.backbone is None else visual.backbone.path
    paths = {
        "llm.": None if model.llm is None else model.llm.path,
        "visual.": None if visual is None else visual.path,
        "visual.backbone.": backbone,
    }
    loaded = [prefix for prefix, path in paths.items() if path is not None]
    for part, folder in init_folders(model).items():
        heads = (name.partition(".")[0] for name in Export(folder).names(HEADS)) if part == HEADS else ()
        loaded += [*heads] or [f"{part}."]
    return tuple(loaded)


class SourceDigests:
    """Digests of the weight files in some folders, computed beside the training in a thread of its own."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._digests: Future[Digests] = Future()
        threading.Thread(target=self._compute, args=(folders,), name="source-digests", daemon=True).start()

    def get(self) -> Digests:
        """Waits until they are there. Raises what reading the files raised."""
        return self._digests.result()

    def _compute(self, folders: Mapping[str, Path]) -> None:
        try:
            self._digests.set_result(digests_of(folders))
        except Exception as error:  # raised by `get`, where the training waits
            self._digests.set_exception(error)


def digests_of(folders: Mapping[str, Path]) -> Digests:
    """Size and sha256 of every weight file of every part."""
    return {part: {path.name: _digest(path) for path in files_of(part, folder)} for part, folder in folders.items()}


def check_unchanged(recorded: Digests, folders: Mapping[str, Path]) -> None:
    """Compare the weight files that an export takes frozen parts from with those the run loaded.

    Raises:
        CheckpointError: one is missing, new or has other bytes; names it.
    """
    present = {
        part: {path.name: _digest(path) if path.is_file() else {} for path in files_of(part, folders[part])}
        for part in recorded
    }
    if change := changed_file(recorded, present, folders):
        raise CheckpointError(
            f"{change}: an export would hold other weights than those trained with. Put the old files back, or export "
            "where they still are"
        )


def changed_file(recorded: Digests, present: Digests, folders: Mapping[str, Path]) -> str:
    """The first weight file that differs from what a run recorded, and how; empty if none does."""
    for part, files in recorded.items():
        now = present.get(part, {})
        for name in sorted(files.keys() | now.keys()):
            if files.get(name) == now.get(name):
                continue
            problem = "was not there" if name not in files else "is missing" if not now.get(name) else "has changed"
            return f"{folders[part] / name} {problem} since the run that froze model.{part} loaded it"
    return ""


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as handle:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _folder(path: str) -> Path:
    config = cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False)
    return Path(path) if config is None else Path(config).parent
