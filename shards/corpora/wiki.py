"""Wikipedia and other MediaWiki texts: the articles of a dump, or WikiExtractor's output.

    --paths train=dewiki-latest-pages-articles.xml.bz2 --language de   read as a stream, several files in sorted order
    --paths train=extracted --language de                              folders AA/wiki_00 ..., WikiExtractor --json

Redirects and pages of other namespaces are skipped. Parsing a dump's markup takes about one second and core per 3 MB
of wikitext; for the largest wikis use WikiExtractor's output, or the parquet files of a hub through ``text``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from shards.corpora.compressed import DAMAGED, cannot_read, open_source
from shards.corpora.rows import read_jsonl
from shards.corpora.text_files import Formats, find_files
from shards.corpora.wiki_markup import FILES_AND_CATEGORIES, plain_text
from shards.errors import DataError, OptionError
from shards.schema import Segment
from shards.text import stable_seed

_DUMP = re.compile(r"\.xml(-[\w-]+)?(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)  # a part of a dump ends in .xml-p1p41242.bz2
FORMATS = Formats(("", ".xml", ".json", ".jsonl"), _DUMP)
_FILES, _CATEGORIES = "6", "14"
_UNITS = ("article", "paragraph")


@dataclass(frozen=True, slots=True)
class Page:
    """An article: its id in the wiki, title and plain text."""

    id: str
    title: str
    text: str
    place: str
    """Its place in the file: ``page 12`` or a line number."""


@dataclass(kw_only=True)
class Wiki:
    """Every article, or every paragraph of every article."""

    NAME = "wiki"

    paths: dict[str, Any]
    """Split -> dump (.xml, .xml.bz2), folder of WikiExtractor's JSON lines, glob, or a list of them."""
    language: str = ""
    unit: str = "article"
    """What one document is: article | paragraph (a line of the article)."""
    namespaces: list[str] = field(default_factory=lambda: ["0"])
    """Numbers of the dump's namespaces that hold documents."""
    dev_fraction: float = 0.0
    """This part of the articles, chosen by a hash of the page id, becomes ``dev``."""
    corpus: str = "wiki"

    def __post_init__(self) -> None:
        self.name = self.corpus
        where = f"corpus {self.corpus}"
        if self.unit not in _UNITS:
            raise OptionError(f"unit {self.unit!r}", where=where, fix=f"use one of {', '.join(_UNITS)}")
        if not 0 <= self.dev_fraction < 1:
            raise OptionError(
                f"dev_fraction {self.dev_fraction} is not within 0..1", where=where, fix="e.g. --dev-fraction 0.001"
            )
        wrong = [number for number in self.namespaces if not number.isdigit()]
        if wrong:
            raise OptionError(f"namespaces {wrong}", where=where, fix="name them by number: 0 holds the articles")
        self.notes: list[str] = []
        self.files = find_files(self.paths, FORMATS, where, self.notes)
        self.settings = {"unit": self.unit, "namespaces": sorted(self.namespaces)}

    def segments(self) -> Iterator[Segment]:
        """One text-only segment per article or paragraph, in file order. Raises DataError for damaged files."""
        for file in self.files:
            path, is_dump = file.path, _DUMP.search(file.path.name)
            for page in _dump_pages(path, frozenset(self.namespaces)) if is_dump else _extracted_pages(path):
                held_out = stable_seed("wiki", page.id) / (1 << 63) < self.dev_fraction
                split = "dev" if held_out else file.split
                texts = [page.text] if self.unit == "article" else page.text.splitlines()
                for number, text in enumerate(texts):
                    yield Segment(
                        corpus=self.corpus,
                        id=page.id if self.unit == "article" else f"{page.id}#{number}",
                        split=split,
                        text=text,
                        language=self.language,
                        origin=f"{path}:{page.place} {page.title!r}",
                    )


def _extracted_pages(path: Path) -> Iterator[Page]:
    """WikiExtractor repeats the title as the first line; it stays part of the text."""
    for number, row in read_jsonl(path, ("id", "title", "text")):
        yield Page(str(row["id"]), str(row["title"]), str(row["text"] or "").strip(), str(number))


def _dump_pages(path: Path, namespaces: frozenset[str]) -> Iterator[Page]:
    """The pages of an export file (schema versions 0.3 to 0.11), one in memory at a time."""
    drop = list(FILES_AND_CATEGORIES)
    try:
        with open_source(path) as handle:
            events = ElementTree.iterparse(handle, ("start", "end"))
            root = next(events)[1]
            if _tag(root) != "mediawiki":
                raise DataError(
                    f"the root element is <{_tag(root)}>", where=str(path), fix="pass a pages-articles dump"
                )
            for event, element in events:
                name = _tag(element)
                if event == "end" and name == "namespace" and element.get("key") in (_FILES, _CATEGORIES):
                    drop.append(element.text or "")
                if event == "end" and name == "page":
                    page = {_tag(child): child for child in element.iter()}
                    if _value(page, "ns", "0") in namespaces and "redirect" not in page:
                        identity = _value({_tag(child): child for child in element}, "id", "")
                        text = plain_text(_value(page, "text", ""), [name for name in drop if name])
                        yield Page(identity, _value(page, "title", ""), text, f"page {identity}")
                    root.clear()
    except ElementTree.ParseError as error:
        raise DataError(f"broken XML ({error})", where=str(path), fix="fetch the dump again") from None
    except DAMAGED as error:
        raise cannot_read(path, error) from None


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _value(parts: dict[str, ElementTree.Element], name: str, default: str) -> str:
    return (parts[name].text or default) if name in parts else default
