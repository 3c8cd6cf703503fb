"""Text documents for continued pretraining: plain text, JSON lines, tables or parquet, rendered through templates.

Templates mix sentences with sign-ordered words, e.g. ``{text}`` and ``signs: {gloss} sentence: {text}``. ``{gloss}``
comes from an annotated field, or, for a run that must stay gloss-free, from the sentence itself without its function
words. All but parquet may be compressed (.gz, .bz2, .xz, .zst).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from shards.corpora.compressed import plain_suffix
from shards.corpora.text_base import TextBase
from shards.corpora.text_documents import PLAIN, SUFFIXES, UNITS, read_documents
from shards.corpora.text_files import Formats, find_files
from shards.errors import OptionError
from shards.schema import Segment


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
            for number, values in read_documents(file.path, fields, self.unit, self.quoting, self.columns):  # type: ignore[arg-type]
                gloss = (values[1] or "") if self.gloss else None
                document = f"{file.split}/{file.label}:{number}"
                yield from self.rendered(document, file.split, values[0], gloss, f"{file.path}:{number}")
