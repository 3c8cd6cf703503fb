"""Rules about one text: lost or doubly encoded characters, the wrong script, markup. Pure functions."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_INVISIBLE = re.compile("[\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_LINE_BREAK = re.compile("[\t\n\r\u2028\u2029]")
_MARKUP = re.compile(r"&(?:[a-zA-Z]{2,8}|#x?[0-9a-fA-F]+);|</?[a-zA-Z][^<>]{0,80}>|\{\\[a-z]+\d*\}")
# Control tokens of common tokenizers; which ones a tokenizer has, `lint --tokenizer` knows.
_CONTROL_TOKEN = re.compile(
    r"</?s>|<(?:pad|unk|mask|bos|eos|cls|sep)>|\[(?:PAD|UNK|MASK|BOS|EOS|CLS|SEP|/?INST)\]|<</?SYS>>"
    r"|<\|[^<>|\s]{1,40}\|>|<(?:start|end)_of_\w{1,20}>|<(?:extra_id_|unused)\d+>|</?tool_call>"
)
_NON_ASCII_RUN = re.compile(r"[^\x00-\x7f]{2,}")
_LEGACY_ENCODINGS = ("cp1252", "cp1250", "latin-1")
# Lead bytes of the UTF-8 sequences that real mojibake holds: Latin, Greek, Cyrillic, punctuation, kana and Han. Others
# (IPA, rare scripts) are met by accident, as in an upper-case accented letter before a closing quotation mark.
_LEADS = frozenset([*range(0xC2, 0xC6), 0xCE, 0xCF, 0xD0, 0xD1, 0xE2, *range(0xE3, 0xEA)])

_CHINESE, _JAPANESE, _KOREAN = ("CJK", "KANGXI"), ("CJK", "HIRAGANA", "KATAKANA"), ("HANGUL", "CJK")
_LATIN_LANGUAGES = (
    "af az bs ca cs cy da de en es et eu fi fr ga gl hr hu id is it lt lv ms mt nb nl nn no pl pt ro sk sl sq sv sw "
    "tl tr uz vi"
)
_SCRIPTS: dict[str, tuple[str, ...]] = {
    **{language: ("LATIN",) for language in _LATIN_LANGUAGES.split()},
    **{language: ("CYRILLIC",) for language in ("be", "bg", "kk", "ky", "mk", "mn", "ru", "tg", "uk")},
    **{language: ("ARABIC",) for language in ("ar", "fa", "ps", "ur")},
    **{language: ("DEVANAGARI",) for language in ("hi", "mr", "ne")},
    "sr": ("CYRILLIC", "LATIN"), "am": ("ETHIOPIC",), "bn": ("BENGALI",), "el": ("GREEK",), "gu": ("GUJARATI",),
    "he": ("HEBREW",), "hy": ("ARMENIAN",), "ja": _JAPANESE, "ka": ("GEORGIAN",), "km": ("KHMER",), "ko": _KOREAN,
    "lo": ("LAO",), "my": ("MYANMAR",), "si": ("SINHALA",), "ta": ("TAMIL",), "te": ("TELUGU",), "th": ("THAI",),
    "zh": _CHINESE, "yue": _CHINESE,
}  # fmt: skip
_SCRIPT_SUBTAGS: dict[str, tuple[str, ...]] = {
    "latn": ("LATIN",), "cyrl": ("CYRILLIC",), "arab": ("ARABIC",), "hans": _CHINESE, "hant": _CHINESE,
    "jpan": _JAPANESE, "kore": _KOREAN, "deva": ("DEVANAGARI",), "grek": ("GREEK",), "hebr": ("HEBREW",),
}  # fmt: skip


def text_problems(text: str, language: str = "", controls: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """(rule, detail) of everything that looks wrong in a text; ``shards.inspect.lint.RULES`` lists the rules.

    Args:
        text: a sentence or document.
        language: BCP-47; empty or unknown languages are not checked for their script.
        controls: the control tokens that a tokenizer reads in the text; without them, those of common tokenizers.
    """
    if not text.strip():
        yield "empty_text", "the text is empty"
        return
    shown = quoted(text)
    if match := _CONTROL.search(text):
        yield "control_character", f"U+{ord(match[0]):04X} at position {match.start()} of {shown}"
    if match := _INVISIBLE.search(text):
        yield "invisible_character", f"U+{ord(match[0]):04X} at position {match.start()} of {shown}"
    if match := _LINE_BREAK.search(text):
        yield "line_break", f"U+{ord(match[0]):04X} at position {match.start()} of {shown}"
    if "\ufffd" in text:
        yield "replacement_character", f"U+FFFD in {shown}: characters were lost when it was decoded"
    if (repaired := repair_mojibake(text)) != text:
        yield "mojibake", f"{shown} was encoded twice, it reads {quoted(repaired)}"
    if spelled := list(controls) or control_tokens(text):
        named = ", ".join(map(repr, spelled))
        yield "control_token", f"{named} in {shown}: tokenised as the characters it consists of"
    if match := _MARKUP.search(_CONTROL_TOKEN.sub(" ", text)):
        yield "markup", f"{match[0]!r} in {shown}"
    if not unicodedata.is_normalized("NFC", text):
        yield "not_nfc", f"{shown} has decomposed characters: other tokens and another hash than the same text in NFC"
    if not any(character.isalnum() for character in text):
        yield "only_punctuation", f"{shown} has no letter and no digit"
    elif wrong := _wrong_script(text, language):
        yield "wrong_script", f"{shown} is {wrong.title()}, the language is {language}"


def control_tokens(text: str) -> list[str]:
    """The control tokens of common tokenizers that a text spells, each once; ``＜/s＞`` counts as well."""
    normalized = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return list(dict.fromkeys(match[0] for match in _CONTROL_TOKEN.finditer(normalized)))


def quoted(text: str, most: int = 60) -> str:
    """A text for a message: cut, with direction marks and other invisible characters escaped."""
    return repr(text if len(text) <= most else text[: most - 1] + "…")


def repair_mojibake(text: str) -> str:
    """The text with repaired UTF-8 that was read as a Windows or Latin-1 code page (``fÃ¼r`` -> ``für``)."""
    return _NON_ASCII_RUN.sub(_repaired_run, text)


def _repaired_run(run: re.Match[str]) -> str:
    before = run.string[run.start() - 1] if run.start() else ""
    if before.isupper() and run[0][0].isupper():  # CAFÉ… and IRMÃ” in capitals are what they are
        return run[0]
    for encoding in _LEGACY_ENCODINGS:
        try:
            data = run[0].encode(encoding)
            fixed = data.decode("utf-8")
        except UnicodeError:
            continue
        if data[0] in _LEADS:
            return fixed
    return run[0]


@functools.lru_cache(maxsize=4096)
def _script(character: str) -> str:
    """First word of a letter's Unicode name (``LATIN``), '' for anything that is no letter."""
    return unicodedata.name(character, "").partition(" ")[0] if character.isalpha() else ""


def _wrong_script(text: str, language: str) -> str:
    """The script of most letters when it is not one of the language's, else ''."""
    tags = language.lower().split("-")
    stated = next((_SCRIPT_SUBTAGS[tag] for tag in tags[1:] if tag in _SCRIPT_SUBTAGS), None)
    expected = stated or _SCRIPTS.get(tags[0])
    if expected is None:
        return ""
    counts: dict[str, int] = {}
    for character in text:
        if script := _script(character):
            counts[script] = counts.get(script, 0) + 1
    foreign = {script: number for script, number in counts.items() if not script.startswith(expected)}
    if sum(foreign.values()) * 2 <= sum(counts.values()):
        return ""
    return max(foreign, key=lambda script: foreign[script])


def is_unspaced(language: str) -> bool:
    """Whether the language writes without spaces between words, so that characters are counted instead."""
    return language.lower().split("-")[0] in ("zh", "yue", "ja", "th", "lo", "km", "my")
