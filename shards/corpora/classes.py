"""Class lists: words by number, as recognition corpora publish them beside tables that give only the numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from shards.corpora.rows import DELIMITERS, read_json, read_lines, split_row
from shards.errors import DataError, OptionError

_POSITION = re.compile(r"[1-9][0-9]{0,3}")
_NUMBER = re.compile(r"([0-9]{1,12})(?:\.0{1,12})?")


class Classes:
    """Words by class.

    Args:
        path: ``.json`` (an object of words by class, or a list from 0), or lines: ``class<delimiter>word``, or a word
            alone, then counted from 0. The delimiter is that of ``.csv``, ``.tsv`` and ``.psv``; in other files a tab,
            or blanks.
        columns: names (of the first line) or positions from 1 of the class and the word; default: the first two.

    Raises:
        DataError: a file that cannot be read, or two words for a class.
        OptionError: no such column.
    """

    def __init__(self, path: Path, columns: Sequence[str] = ()) -> None:
        self.path = path
        self._words: dict[str, str] = {}
        if columns and len(columns) != 2:
            raise OptionError(
                f"{len(columns)} columns", where=f"classes {path}", fix="name two: --class-columns NUMBER,WORD"
            )
        for where, number, word in self._json() if path.suffix.lower() == ".json" else self._lines(columns):
            known = self._words.setdefault(_normal_number(number), word)
            if known != word:
                raise DataError(f"the class {number} is {known!r} and {word!r}", where=where, fix="keep one of the two")

    def word(self, number: str, where: str) -> str:
        """The word of a class; ``7``, ``07`` and ``7.0`` are the same. Raises DataError for an unlisted class."""
        word = self._words.get(_normal_number(number))
        if word is None:
            raise DataError(
                f"no class {number[:40]!r} among the {len(self._words)} of {self.path.name}",
                where=where,
                fix="use the class list of the same corpus, or choose its columns with --class-columns",
            )
        return word

    def _json(self) -> Iterator[tuple[str, str, str]]:
        content = read_json(self.path)
        if not isinstance(content, list | dict):
            raise DataError(f"a {type(content).__name__}, no list of classes", where=str(self.path), fix="use a list")
        for key, word in enumerate(content) if isinstance(content, list) else content.items():
            if not isinstance(word, str):
                raise DataError(f"the class {key} is {word!r}, no word", where=str(self.path), fix='use {"0": "word"}')
            yield f"{self.path}: {key}", str(key), word.strip()

    def _lines(self, columns: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        delimiter = DELIMITERS.get(self.path.suffix.lower(), "")
        places: tuple[int, int] | None = None
        words_alone = False
        for line, text in read_lines(self.path):
            where = f"{self.path}:{line}"
            cells = [cell.strip() for cell in self._cells(text, delimiter, where)]
            if not any(cells):
                continue
            if places is None:
                places, skip = _places(cells, columns, where)
                words_alone = len(cells) == 1 and not columns
                if skip:
                    continue
            if words_alone:
                yield where, str(len(self._words)), text.strip()
                continue
            if len(cells) <= max(places):
                raise DataError(f"{len(cells)} fields", where=where, fix="repair the line: class and word")
            yield where, cells[places[0]], cells[places[1]]

    @staticmethod
    def _cells(text: str, delimiter: str, where: str) -> list[str]:
        if delimiter == ",":
            return split_row(text, delimiter, where)
        if delimiter or "\t" in text:
            return text.split(delimiter or "\t")
        number, _, word = text.strip().partition(" ")
        return [number, word] if word and _NUMBER.fullmatch(number) else [text]


def _places(first: list[str], columns: Sequence[str], where: str) -> tuple[tuple[int, int], bool]:
    """Positions of class and word, and whether the first line is a header."""
    if not columns:
        return (0, 1), len(first) > 1 and not any(map(_NUMBER.fullmatch, first))
    if all(map(_POSITION.fullmatch, columns)):
        number, word = (int(name) - 1 for name in columns)
        return (number, word), not _NUMBER.fullmatch(first[number] if 0 <= number < len(first) else "")
    if missing := [name for name in columns if name not in first]:
        raise OptionError(f"no column {missing[0]!r}; there are {first}", where=where, fix="correct --class-columns")
    return (first.index(columns[0]), first.index(columns[1])), True


def _normal_number(number: str) -> str:
    match = _NUMBER.fullmatch(number.strip())
    return str(int(match[1])) if match else number.strip()
