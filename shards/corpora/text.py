"""Text documents for continued pretraining: plain text, JSON lines or tables, rendered through templates.

Templates mix sentences with sign-ordered words, e.g. ``{text}`` and ``signs: {gloss} sentence: {text}``. ``{gloss}``
comes from an annotated field, or, for a run that must stay gloss-free, from the sentence itself without its function
words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.corpora.rows import DELIMITERS, read_jsonl, read_lines, read_table
from shards.errors import DataError
from shards.schema import Segment, text_hash
from shards.text import check_template, pseudo_gloss, render_pair, repeat_words, stable_seed

_SUFFIXES = (".txt", ".jsonl", ".ndjson", *DELIMITERS)


@dataclass(kw_only=True)
class Text:
    """Every document of the files, once per template and pass."""

    NAME = "text"

    paths: dict[str, Any]
    """Split -> file, or list of files: ``train=a.txt,dev=b.txt``. .txt holds one document per line."""
    text: str = "text"
    """Field or column of the document (not for .txt)."""
    gloss: str = ""
    """Field or column of annotated signs; empty: pseudo glosses from ``function_words``."""
    templates: list[str] = field(default_factory=lambda: ["{text}"])
    function_words: list[str] = field(default_factory=list)
    """Words that pseudo glosses leave out, or one file with a word per line."""
    repeat_max: int = 1
    """Each word of ``{gloss}`` is repeated 1..repeat_max times: one sign covers several visual word tokens."""
    lowercase_gloss: bool = False
    """Write glosses in lower case, so that they share tokens with the words of the sentences."""
    passes: int = 1
    """Variants per document for templates with repeated words."""
    seed: int = 0
    language: str = ""
    corpus: str = "text"
    """Name of the corpus in index and metrics (perplexity is reported per corpus)."""
    quoting: bool | None = None
    """Whether ``"`` quotes table fields; default: only for commas."""

    def __post_init__(self) -> None:
        self.name = self.corpus
        where = f"corpus {self.corpus}"
        for template in self.templates:
            check_template(template)
        if not self.templates or min(self.repeat_max, self.passes) < 1:
            raise DataError("templates, repeat_max and passes must be >= 1", where=where, fix="correct the option")
        self.files = self._files(where)
        if len(self.function_words) == 1 and Path(self.function_words[0]).is_file():
            self.function_words = [line.strip() for _, line in read_lines(Path(self.function_words[0])) if line.strip()]
        self.dropped = frozenset(word.casefold() for word in self.function_words)
        if any("{gloss" in template for template in self.templates) and not (self.gloss or self.dropped):
            raise DataError(
                "a template uses {gloss}, but there is neither a gloss field nor function_words",
                where=where,
                fix="pass gloss=FIELD, or function_words=FILE for pseudo glosses",
            )
        names = ("templates", "repeat_max", "lowercase_gloss", "passes", "seed")
        self.settings = {name: getattr(self, name) for name in names}
        self.settings["gloss"] = "annotated" if self.gloss else "pseudo" if self.dropped else "none"

    def _files(self, where: str) -> list[tuple[str, Path]]:
        files: list[tuple[str, Path]] = []
        for split, given in self.paths.items():
            for path in map(Path, given if isinstance(given, list) else [given]):
                if path.suffix not in _SUFFIXES:
                    raise DataError(f"{path}: unknown file type", where=where, fix=f"use {', '.join(_SUFFIXES)}")
                if path.suffix == ".txt" and self.gloss:
                    raise DataError(f"{path} has no field {self.gloss!r}", where=where, fix="use a table or JSON lines")
                if not split.isidentifier():
                    raise DataError(f"split {split!r}", where=where, fix="use a plain word such as train or dev")
                if (split, path.name) in {(other, file.name) for other, file in files}:
                    raise DataError(f"two {split} files named {path.name}", where=where, fix="rename one: ids use it")
                files.append((split, path))
        return files

    def segments(self) -> Iterator[Segment]:
        """One text-only segment per document, template and pass."""
        for split, path in self.files:
            for line, text, gloss in self._documents(path):
                for number, template in enumerate(self.templates):
                    varied = self.repeat_max > 1 and "{gloss" in template
                    for variant in range(self.passes if varied else 1):
                        yield Segment(
                            corpus=self.corpus,
                            id=f"{split}/{path.name}:{line}#{number}.{variant}",
                            split=split,
                            text=self._render(template, text, gloss, (number, variant)),
                            language=self.language,
                            gloss=gloss if "{gloss" in template else "",
                            origin=f"{path}:{line}",
                        )

    def _documents(self, path: Path) -> Iterator[tuple[int, str, str]]:
        """(line, text, gloss) of each document; blank lines of a .txt file are no documents."""
        needed = [self.text, *([self.gloss] if self.gloss else [])]
        rows: Iterator[tuple[int, dict[str, Any]]]
        if path.suffix == ".txt":
            rows = ((line, {self.text: text}) for line, text in read_lines(path) if text.strip())
        elif path.suffix in DELIMITERS:
            delimiter = DELIMITERS[path.suffix]
            quoting = delimiter == "," if self.quoting is None else self.quoting
            rows = read_table(path, delimiter, quoting, needed)
        else:
            rows = read_jsonl(path, needed)
        for line, row in rows:
            text = str(row[self.text] or "").strip()
            annotated = row[self.gloss] if self.gloss else pseudo_gloss(text, self.dropped) if self.dropped else ""
            words = annotated if isinstance(annotated, list) else str(annotated or "").split()
            joined = " ".join(map(str, words))
            yield line, text, joined.lower() if self.lowercase_gloss else joined

    def _render(self, template: str, text: str, gloss: str, variant: tuple[int, int]) -> str:
        """The document; empty, hence a counted skip, when a field the template needs is empty."""
        fields = {"text": text, "gloss": gloss}
        if any(not value for name, value in fields.items() if "{" + name in template):
            return ""
        if self.repeat_max > 1:
            seed = stable_seed(self.seed, text_hash(text), *variant)
            fields["gloss"] = repeat_words(gloss, seed, self.repeat_max)
        return render_pair(template, fields)
