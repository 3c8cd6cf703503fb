"""Text documents for continued pretraining: plain text, JSON lines, tables or parquet, rendered through templates.

Templates mix sentences with sign-ordered words, e.g. ``{text}`` and ``signs: {gloss} sentence: {text}``. ``{gloss}``
comes from an annotated field, or, for a run that must stay gloss-free, from the sentence itself without its function
words. All formats but parquet may be compressed (.gz, .bz2, .xz, .zst).

If a folder is a shard set, a split reads the samples of the same split: ``--paths train=data/ph14t`` takes the
sentences of the videos' train split, and none that later stages are scored on.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from shards.corpora.compressed import plain_suffix
from shards.corpora.rows import DELIMITERS
from shards.corpora.table import usual_split
from shards.corpora.text_base import TextBase
from shards.corpora.text_documents import PARQUET, PLAIN, SUFFIXES, UNITS, fields_of, read_documents
from shards.corpora.text_files import Formats, TextFile, find_files
from shards.errors import OptionError
from shards.schema import Segment
from shards.wording import listed

logger = logging.getLogger(__name__)
_SPLIT = "split"


@dataclass(kw_only=True)
class Text(TextBase):
    """Every document of the files, once per template and pass."""

    NAME = "text"

    paths: dict[str, Any]
    """Split -> file, folder, glob, or list of them: ``train=a.txt,dev=b.txt``."""
    text: str = "text"
    """Field or column of the document (not for .txt); ``a.b`` is a field within a field."""
    gloss: str = ""
    """Field or column of annotated signs; empty: pseudo glosses from ``function_words``."""
    columns: list[str] = field(default_factory=list)
    """Names of all columns of tables without a header line, in order: ``text,gloss``."""
    unit: str = "line"
    """What one document of a .txt file is: line | paragraph (between blank lines) | file."""
    quoting: bool | None = None
    """Whether ``"`` quotes table fields; default: only for commas."""

    def __post_init__(self) -> None:
        where = f"corpus {self.corpus}"
        if self.unit not in UNITS:
            raise OptionError(f"unit {self.unit!r}", where=where, fix=f"use one of {', '.join(UNITS)}")
        self.notes: list[str] = []
        self.files = find_files(self.paths, Formats(SUFFIXES), where, self.notes)
        for file in self.files:
            if plain_suffix(file.path) == PLAIN and self.gloss:
                raise OptionError(
                    f"{file.path} has no field {self.gloss!r}", where=where, fix="use a table or JSON lines"
                )
        self.prepare(bool(self.gloss))

    def segments(self) -> Iterator[Segment]:
        """One text-only segment per document, template and pass."""
        fields = [self.text, self.gloss] if self.gloss else [self.text]
        for file in self.files:
            has_split = _SPLIT in self._columns(file)
            others: collections.Counter[str] = collections.Counter()
            columns = [*fields, _SPLIT] if has_split else fields
            read = read_documents(file.path, columns, self.unit, self.quoting, self.columns)  # type: ignore[arg-type]
            for number, values in read:
                if has_split and (split := usual_split(str(values.pop() or file.split))) != file.split:
                    if file.of_set:
                        continue
                    others[split] += 1
                gloss = (values[1] or "") if self.gloss else None
                document = f"{file.split}/{file.label}:{number}"
                yield from self.rendered(document, file.split, values[0], gloss, f"{file.path}:{number}")
            self._note_other_splits(file, others)

    def _columns(self, file: TextFile) -> list[str]:
        """Columns of a table; none for JSON lines, whose objects may differ."""
        tabular = plain_suffix(file.path) in (*DELIMITERS, PARQUET)
        return (self.columns or fields_of(file.path) or []) if tabular else []

    def _note_other_splits(self, file: TextFile, others: collections.Counter[str]) -> None:
        """Note rows taken into a split other than their own: evaluation sentences must not be trained on."""
        if not others:
            return
        note = (
            f"{file.path}: {others.total()} rows are taken into {file.split}, but their column {_SPLIT!r} says "
            f"{listed(others)}; a later stage must not be scored on them. Give one file per split, or build from the "
            f"video set: --paths {file.split}=SET"
        )
        if note not in self.notes:
            self.notes.append(note)
            logger.warning(note)
