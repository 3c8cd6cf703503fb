"""Rules that judge a single text: length, symbols, repeated lines, language."""

from __future__ import annotations

import functools
import unicodedata
from importlib.metadata import version
from typing import Any

from shards.errors import OptionError
from shards.filter.options import FilterOptions

_JUDGED_CHARACTERS = 200
"""The beginning is enough to identify the language."""

TOO_SHORT, TOO_LONG, SYMBOLS, DIGITS = "too_short", "too_long", "symbols", "digits"
REPEATED_LINES, LANGUAGE = "repeated_lines", "language"
REASONS = (TOO_SHORT, TOO_LONG, SYMBOLS, DIGITS, REPEATED_LINES, LANGUAGE)


class TextRules:
    """Finds the reason to exclude a text. Raises OptionError for a language the library does not know."""

    def __init__(self, options: FilterOptions) -> None:
        self.options = options
        self._identifier = _language_identifier(options.languages) if options.languages else None
        self._languages = {_primary(code) for code in options.languages}

    def reason(self, text: str, folded: str) -> str:
        """One of :data:`REASONS`, or ``""``; ``folded`` is ``fold_text(text)``."""
        return self._length(text, folded) or self._characters(text) or self._lines(text) or self._language(text)

    def _length(self, text: str, folded: str) -> str:
        options, characters = self.options, len(text)
        words = folded.count(" ") + bool(folded)
        if characters < options.min_characters or words < options.min_words:
            return TOO_SHORT
        beyond = (characters > options.max_characters > 0) or (words > options.max_words > 0)
        return TOO_LONG if beyond else ""

    def _characters(self, text: str) -> str:
        options = self.options
        if min(options.max_symbol_fraction, options.max_digit_fraction) >= 1:
            return ""
        dense = "".join(text.split())
        symbols = sum(not (mark.isalnum() or _is_vowel_sign(mark)) for mark in dense)
        if symbols > options.max_symbol_fraction * len(dense):
            return SYMBOLS
        return DIGITS if sum(map(str.isdecimal, dense)) > options.max_digit_fraction * len(dense) else ""

    def _lines(self, text: str) -> str:
        if self.options.max_repeated_line_fraction >= 1:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        repeated = len(lines) - len(set(lines))
        return REPEATED_LINES if repeated > self.options.max_repeated_line_fraction * len(lines) else ""

    def _language(self, text: str) -> str:
        if self._identifier is None or len(text) < self.options.language_min_characters:
            return ""
        language, confidence = self._identifier.classify(" ".join(text[:_JUDGED_CHARACTERS].split()))
        other = language not in self._languages and confidence >= self.options.language_confidence
        return LANGUAGE if other else ""


def language_library() -> str:
    """Name and version of the language identifier, whose model decides which texts stay."""
    return f"py3langid {version('py3langid')}"


@functools.lru_cache(maxsize=1)
def _load_identifier() -> Any:
    """The model that comes with the library; a second to load."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language_identifier(codes: list[str]) -> Any:
    identifier = _load_identifier()
    unknown = sorted({_primary(code) for code in codes} - set(identifier.labels))
    if unknown:
        known = ", ".join(sorted(identifier.labels))
        raise OptionError(
            f"no model for the language {', '.join(unknown)}", where="filter languages", fix=f"known: {known}"
        )
    return identifier


def _primary(code: str) -> str:
    """``de`` of ``de-AT``."""
    return code.partition("-")[0].lower()


def _is_vowel_sign(mark: str) -> bool:
    """Marks (Devanagari's vowel signs, Arabic's points) are parts of letters."""
    return unicodedata.category(mark).startswith("M")
