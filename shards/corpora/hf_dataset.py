"""Hugging Face datasets that ``save_to_disk`` wrote, read with Arrow alone: a ``Dataset`` or a ``DatasetDict`` folder.

    root/dataset_dict.json            only for several splits: {"splits": ["train", "validation"]}
    root/train/state.json             the names of the data files
    root/train/data-00000-of-00002.arrow ...    Arrow streams

Files are mapped, not loaded. Parquet folders from the hub are read by the corpus ``text``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from shards.corpora.rows import read_json
from shards.corpora.text_base import TextBase
from shards.corpora.text_documents import arrow_columns, arrow_rows
from shards.corpora.text_files import check_split
from shards.errors import DataError
from shards.schema import Segment

_DICT, _STATE = "dataset_dict.json", "state.json"
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(kw_only=True)
class HfDataset(TextBase):
    """Every row of a saved dataset, once per template and pass."""

    NAME = "hf_dataset"

    root: Path
    """The folder given to ``save_to_disk``."""
    text: str = "text"
    """Column of the document; ``translation.de`` is a field within a column."""
    gloss: str = ""
    """Column of annotated signs (text or list); empty: pseudo glosses from ``function_words``."""
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "validation": "dev", "test": "test"})
    """Split of the dataset -> our split; others are left out. A folder without splits counts as ``train``."""

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        where = f"corpus {self.corpus}"
        for split in self.splits.values():
            check_split(split, where)
        self.folders = self._folders()
        chosen = [name for name in self.folders if name in self.splits]
        if not chosen:
            raise DataError(
                f"none of the dataset's splits {sorted(self.folders)} is mapped",
                where=str(self.root),
                fix="add --splits NAME=train",
            )
        self.chosen = chosen
        self.prepare(bool(self.gloss))

    def _folders(self) -> dict[str, Path]:
        if (self.root / _DICT).is_file():
            names = _entry(self.root / _DICT, "splits")
            return {str(name): self.root / str(name) for name in names}
        if (self.root / _STATE).is_file():
            return {"train": self.root}
        raise DataError(
            f"neither {_DICT} nor {_STATE} in it", where=str(self.root), fix="pass the folder given to save_to_disk"
        )

    def segments(self) -> Iterator[Segment]:
        """One segment per row, template and pass. Raises DataError for missing, cut off or unreadable files."""
        fields = [self.text, self.gloss] if self.gloss else [self.text]
        for name in self.chosen:
            split = self.splits[name]
            row = 0
            for path in self._files(self.folders[name]):
                for number, values in _read_stream(path, fields):
                    gloss = (values[1] if values[1] is not None else "") if self.gloss else None
                    yield from self.rendered(f"{name}:{row}", split, values[0], gloss, f"{path}:{number}")
                    row += 1

    def _files(self, folder: Path) -> list[Path]:
        state = folder / _STATE
        if _entry(state, "_indices_data_files", optional=True):
            raise DataError(
                "the rows are chosen by an index file, as old versions of datasets saved them",
                where=str(state),
                fix="load and save the dataset again with a current version of datasets",
            )
        names = [file.get("filename") if isinstance(file, dict) else None for file in _entry(state, "_data_files")]
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise DataError(f"names the data files {names}", where=str(state), fix="save the dataset again")
        return [folder / str(name) for name in names]


def _entry(path: Path, key: str, optional: bool = False) -> list[object]:
    values = read_json(path)
    entry = values.get(key) if isinstance(values, dict) else None
    if isinstance(entry, list) or (optional and not entry):
        return entry or []
    raise DataError(f"{key} is {entry!r}, not a list", where=str(path), fix="save the dataset again")


def _read_stream(path: Path, fields: list[str]) -> Iterator[tuple[int, list[object]]]:
    try:
        with pa.memory_map(str(path)) as source:
            _check_end(path, source)
            with pa.ipc.open_stream(source) as reader:
                arrow_columns(reader.schema.names, fields, str(path))
                yield from arrow_rows(reader, fields, str(path))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"not an Arrow stream ({error})", where=str(path), fix="save the dataset again") from None


def _check_end(path: Path, source: pa.MemoryMappedFile) -> None:
    """Without its end mark, a stream cut between two batches looks like a shorter one."""
    size = source.size()
    source.seek(max(0, size - len(_STREAM_END)))
    if source.read(len(_STREAM_END)) != _STREAM_END:
        raise DataError(f"cut off after {size} bytes: no end mark", where=str(path), fix="copy or save it again")
    source.seek(0, os.SEEK_SET)
