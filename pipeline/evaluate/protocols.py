"""Scoring protocols: how a corpus's texts are prepared before they are scored, and where the convention comes from.

BLEU figures of different protocols must not be compared; every score carries its protocol's name and signature.
"""

from __future__ import annotations

import difflib
import unicodedata
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import RecipeError

UNICODE_FORM: Literal["NFC"] = "NFC"


@dataclass(frozen=True, slots=True)
class Protocol:
    """One way to prepare texts and compute scores."""

    name: str
    source: str
    """Where the convention comes from."""
    tokenize: Literal["13a", "char", "zh", "none"] = "13a"
    """sacreBLEU tokenizer."""
    lowercase: bool = False
    """Both sides; appears as ``case:lc`` in the signature."""
    unit: Literal["word", "character"] = "word"
    """What ROUGE-L counts."""
    replacements: tuple[tuple[str, str], ...] = ()
    """Applied to both sides before scoring, in order."""
    strip_spaces: bool = False
    """Remove all white space from both sides (Chinese texts stored as segmented words)."""
    suffix: str = ""
    """Appended to both sides."""

    def prepare(self, text: str) -> str:
        """One hypothesis or reference as the metrics get it; an empty text stays empty except for `suffix`.

        All spellings of a character are equal (NFC): sacreBLEU compares code points and would count two forms of
        ``é`` as different words.
        """
        text = " ".join(unicodedata.normalize(UNICODE_FORM, text).split())
        for old, new in self.replacements:
            text = text.replace(old, new)
        if self.strip_spaces:
            text = "".join(text.split())
        return text + self.suffix

    def to_dict(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__} | {"unicode": UNICODE_FORM}


_FULLWIDTH = (("，", ","), ("？", "?"))

_ALL = (
    Protocol("default", "sacreBLEU default (Post 2018): 13a tokens, cased"),
    Protocol(
        "phoenix14t",
        "PHOENIX-2014T references are lower-cased without punctuation (Camgoz et al. 2018)",
        lowercase=True,
    ),
    Protocol(
        "phoenix14t_dot",
        "PHOENIX-2014T with ' .' appended to both sides, as several published systems do; it raises BLEU",
        lowercase=True,
        suffix=" .",
    ),
    Protocol(
        "csl_daily",
        "CSL-Daily (Zhou et al. 2021): BLEU and ROUGE over characters; fullwidth comma and question mark mapped to "
        "ASCII as in Uni-Sign (arXiv 2501.15187)",
        tokenize="char",
        unit="character",
        replacements=_FULLWIDTH,
        strip_spaces=True,
    ),
    Protocol(
        "csl_daily_zh",
        "CSL-Daily with sacreBLEU's zh tokenizer: Chinese characters apart, runs of Latin letters and digits kept",
        tokenize="zh",
        unit="character",
        replacements=_FULLWIDTH,
        strip_spaces=True,
    ),
    Protocol("how2sign", "How2Sign cased, as YouTube-ASL (arXiv 2306.15162) and SSVP-SLT (arXiv 2402.09611) score it"),
    Protocol("how2sign_lower", "How2Sign lower-cased, as SpaMo (arXiv 2408.10593) scores it", lowercase=True),
    Protocol("openasl", "OpenASL cased with 13a tokens, as Uni-Sign's English sets"),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def get_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        RecipeError: no such protocol; names the nearest one and all that exist.
    """
    if name not in PROTOCOLS:
        close = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        raise RecipeError(f"`{name}` is not a scoring protocol{hint} Known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
