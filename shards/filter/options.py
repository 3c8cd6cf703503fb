"""What to filter and by which limits; every field is recorded in the manifest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from shards.errors import OptionError
from shards.filter.dedup import LOWEST_THRESHOLD

CONTAMINATION_MODES = ("auto", "off", "report", "exclude")


@dataclass(frozen=True, slots=True)
class FilterOptions:
    """Rules for the texts of a corpus; by default all are off."""

    splits: list[str] = field(default_factory=lambda: ["train"])
    """The splits that are filtered; published evaluation splits stay as they are."""

    min_characters: int = 0
    max_characters: int = 0
    """0: no limit."""
    min_words: int = 0
    max_words: int = 0
    """0: no limit. In scripts without spaces a character is a word."""
    max_symbol_fraction: float = 1.0
    """Most of the non-space characters that may be neither letter nor digit, as a fraction; 1: no limit."""
    max_digit_fraction: float = 1.0
    """Most of the non-space characters that may be digits, as a fraction; 1: no limit."""
    max_repeated_line_fraction: float = 1.0
    """Most of the lines that may repeat an earlier line of the same text, as a fraction; 1: no limit."""

    languages: list[str] = field(default_factory=list)
    """BCP-47 codes to keep (``de``); empty: every language."""
    language_confidence: float = 0.6
    """Exclude a text only if it is in another language with at least this confidence."""
    language_min_characters: int = 40
    """Shorter texts are not judged: no library identifies the language of three words."""

    exact_duplicates: bool = False
    """Leave out texts equal to an earlier one, except for case, white space and punctuation around words."""
    near_duplicates: float = 0.0
    """Leave out texts whose word n-grams are this similar (Jaccard, 0.5..1) to an earlier one; 0: keep them."""
    near_duplicate_words: int = 3
    """Words per n-gram; 3 suits sentences, 5 suits longer documents."""
    permutations: int = 128
    """Bytes kept per text for near duplicates; the similarity's standard deviation is at most 0.5 / sqrt of it."""

    contamination: str = ""
    """Training texts that occur in evaluation texts: off | report | exclude; auto excludes them from text corpora and
    reports them for videos, whose official splits are never changed. Default: auto with ``against``, else off."""
    contamination_words: int = 8
    """Words per n-gram of the overlap; shorter evaluation texts count only if equal."""
    contamination_overlap: float = 0.8
    """This part of an evaluation text's n-grams must occur in one training text."""
    against: list[str] = field(default_factory=list)
    """More evaluation texts: shard sets (their splits other than train, all of a set without train) or text files."""
    against_text: str = "text"
    """Field or column of the text in the files of ``against`` (not for .txt)."""

    def __post_init__(self) -> None:
        self._check_limits()
        self._check_fractions()
        if self.contamination not in ("", *CONTAMINATION_MODES):
            known = ", ".join(CONTAMINATION_MODES)
            raise OptionError(f"contamination {self.contamination!r}", where="filter", fix=f"use one of {known}")
        if self.against_text != "text" and not self.against:
            raise OptionError(
                "against_text has no effect without against", where="filter", fix="add --filter against=FILE"
            )
        if self.against and self.contamination == "off":
            raise OptionError(
                "against has no effect with contamination off", where="filter", fix="remove one of the two"
            )

    @property
    def contamination_mode(self) -> str:
        """What ``contamination`` means, one of :data:`CONTAMINATION_MODES`: no other rule decides it."""
        return self.contamination or ("auto" if self.against else "off")

    def _check_limits(self) -> None:
        for name in ("min_characters", "max_characters", "min_words", "max_words", "language_min_characters"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} is {getattr(self, name)}", where="filter", fix="use 0 or more")
        for name in ("near_duplicate_words", "permutations", "contamination_words"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}", where="filter", fix="use 1 or more")
        for unit in ("characters", "words"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if high and low > high:
                raise OptionError(f"min_{unit} {low} is above max_{unit} {high}", where="filter", fix="exchange them")

    def _check_fractions(self) -> None:
        names = ("max_symbol_fraction", "max_digit_fraction", "max_repeated_line_fraction")
        for name in (*names, "language_confidence", "contamination_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(
                    f"{name} {getattr(self, name)} is not within 0..1", where="filter", fix="use a fraction"
                )
        if self.near_duplicates and not LOWEST_THRESHOLD <= self.near_duplicates <= 1:
            raise OptionError(
                f"near_duplicates {self.near_duplicates} is not within {LOWEST_THRESHOLD}..1",
                where="filter",
                fix="0.8 is usual; 0 keeps near duplicates",
            )

    def record(self) -> dict[str, object]:
        """The options that differ from their defaults, for the manifest."""
        changed: dict[str, object] = {}
        for option in dataclasses.fields(self):
            factory: Any = option.default_factory
            usual = option.default if factory is dataclasses.MISSING else factory()
            if (value := getattr(self, option.name)) != usual:
                changed[option.name] = sorted(value) if isinstance(value, list) else value
        return changed
