"""Parallel text: a file of sentences and a file of sign glosses with the same number of lines (ASLG-PC12 and others).

    --text train=aslg.train.en,dev=aslg.dev.en --gloss train=aslg.train.gloss.asl,dev=aslg.dev.gloss.asl
    --templates '["{text}", "signs: {gloss} sentence: {text}"]'

Both files may be compressed. A tab separated file with both columns is read by the corpus ``text``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.corpora.rows import read_lines
from shards.corpora.text_base import TextBase
from shards.corpora.text_files import check_split
from shards.errors import DataError, OptionError
from shards.schema import Segment


@dataclass(kw_only=True)
class Parallel(TextBase):
    """Line n of one file belongs to line n of the other."""

    NAME = "parallel"

    text: dict[str, str]
    """Split -> file of sentences, one on a line."""
    gloss: dict[str, str]
    """Split -> file of glosses, aligned with it."""
    templates: list[str] = field(default_factory=lambda: ["signs: {gloss} sentence: {text}"])
    """One document per pair and template."""

    def __post_init__(self) -> None:
        where = f"corpus {self.corpus}"
        if set(self.text) != set(self.gloss):
            raise OptionError(
                f"splits of text {sorted(self.text)} and gloss {sorted(self.gloss)} differ",
                where=where,
                fix="give both files for every split",
            )
        for split in self.text:
            check_split(split, where)
        self.prepare(True)

    def segments(self) -> Iterator[Segment]:
        """One segment per pair of lines, template and pass. Raises DataError when a file has more lines."""
        for split in self.text:
            left, right = Path(self.text[split]), Path(self.gloss[split])
            for text, gloss in itertools.zip_longest(read_lines(left), read_lines(right)):
                if text is None or gloss is None:
                    shorter, line = (left, gloss[0]) if text is None else (right, text[0])
                    raise DataError(
                        f"ends before line {line}, the other file goes on",
                        where=str(shorter),
                        fix="align the two files",
                    )
                number, sentence = text
                yield from self.rendered(f"{split}/{left.name}:{number}", split, sentence, gloss[1], f"{left}:{number}")
