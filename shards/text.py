"""Text, pure per document: templates, gloss-free pseudo glosses, word repetition, tokenisation.

Continued pretraining teaches the language model to read sign-ordered words before it ever sees video. A run that must
stay gloss-free renders pseudo glosses: the sentence's own words without function words.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import string
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from shards.errors import DataError, OptionError

TEMPLATE_FIELDS = ("text", "gloss")
_BEYOND_ASCII = "«»„“”‚‘’¿¡…–—。，！？、；：（）《》「」『』·؟،؛।۔"
_PUNCTUATION = string.punctuation + _BEYOND_ASCII
_MARK = re.compile(rf"[!-/:-@\[-`{{-~{_BEYOND_ASCII}]")
# Thai, Lao, Burmese, Khmer; kana and ideographs: no spaces between words, so a character counts as a word.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")

_IDEOGRAPH = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
# Letters of kana, Thai, Lao, Tibetan, Burmese, Khmer, Tai, Balinese and Javanese: their function words are also parts
# of other words, and no rule on characters tells which.
_NEEDS_SEGMENTER = re.compile(
    "[\u3041-\u3096\u30a1-\u30fa\uff66-\uff9d\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0edf\u0f40-\u0fbc\u1000-\u109f"
    "\u1780-\u17d3\u1950-\u19df\u1a20-\u1aad\u1b00-\u1b4c\ua980-\ua9c0\ua9e0-\ua9fe\uaa60-\uaadf]"
)
_WORD_BORDER = "\u200b"
"""Zero width space: separates words in scripts that show no space between them (Unicode Standard, section 6.2)."""
_INNER_MARK = re.compile(rf"(?<![0-9A-Za-z]){_MARK.pattern}|{_MARK.pattern}(?![0-9A-Za-z])")


def check_template(template: str) -> None:
    """Raise DataError unless ``template`` names at least one of ``{text}`` and ``{gloss}`` and nothing else."""
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise OptionError(
            f"{template!r} is not a template ({error})", where="templates", fix="write {{ for {"
        ) from None
    if not fields or not fields <= set(TEMPLATE_FIELDS):
        raise OptionError(
            f"{template!r} uses {sorted(fields) or 'no field'}",
            where="templates",
            fix="use {text} and {gloss}, for example 'signs: {gloss} sentence: {text}'",
        )


def render_pair(template: str, fields: Mapping[str, str]) -> str:
    """Fill ``{text}`` and ``{gloss}``; surrounding white space goes. Raises DataError for other fields."""
    check_template(template)
    return template.format_map(dict(fields)).strip()


def pseudo_gloss(text: str, function_words: Collection[str], where: str = "pseudo glosses") -> str:
    """The words of ``text`` without punctuation and function words, in their order: a gloss no annotator wrote.

    Words end at white space or a zero width space. In Chinese without either, function words and punctuation are the
    borders: the longest function word at each place goes, wherever it stands, and what lies between two is one word.

    Args:
        text: a sentence.
        function_words: casefolded words to drop.
        where: origin of the text, for the message.

    Raises:
        DataError: the text is mostly in a script without spaces in which function words cannot be found so (Japanese,
            Thai, Lao, Burmese, Khmer and others), and shows no word borders.
    """
    segmented = _WORD_BORDER in text
    if not segmented:
        _check_borders(text, where)
    words = (word.strip(_PUNCTUATION) for word in text.replace(_WORD_BORDER, " ").split())
    kept = [word for word in words if word and word.casefold() not in function_words]
    if not segmented and _IDEOGRAPH.search(text):
        kept = [part for word in kept for part in _between_function_words(word, function_words)]
    return " ".join(kept)


def _check_borders(text: str, where: str) -> None:
    unclear = len(_NEEDS_SEGMENTER.findall(text))
    unspaced = unclear + len(_IDEOGRAPH.findall(text))
    # a foreign name in a text with spaces is one word, a kana in a Chinese one no Japanese
    if 2 * unspaced > sum(map(str.isalpha, text)) and 10 * unclear > unspaced:
        raise DataError(
            f"no word borders in {text[:40]!r}: its script has no spaces, so function words cannot be found",
            where=where,
            fix="segment the texts with a tool for their language: put U+200B between words, or write the content"
            " words into a field and name it with --gloss FIELD",
        )


def _between_function_words(word: str, function_words: Collection[str]) -> list[str]:
    """Parts of a word with ideographs that are left between the function words of ideographs inside it."""
    if not _IDEOGRAPH.search(word):
        return [word]
    found = (known for known in function_words if known and all(map(_IDEOGRAPH.match, known)))
    borders = [re.escape(known) for known in sorted(found, key=len, reverse=True)]
    parts = re.split("|".join([_INNER_MARK.pattern, *borders]), word)
    return [part for part in (part.strip(_PUNCTUATION) for part in parts) if part]


def fold_text(text: str) -> str:
    """What is compared when texts are compared: words in folded case without punctuation around them, one space apart.

    Compatibility forms become one (NFKC). In scripts without spaces every character is a word.
    """
    folded = text.casefold()
    if not text.isascii():
        folded = unicodedata.normalize("NFKC", folded)
        if _UNSPACED.search(folded):
            folded = _UNSPACED.sub(r" \g<0> ", folded)
    words = folded.split()
    if _MARK.search(folded) is None:
        return " ".join(words)
    return " ".join(filter(None, [word.strip(_PUNCTUATION) for word in words]))


def repeat_words(gloss: str, seed: int, max_repeat: int) -> str:
    """Repeat every word 1..``max_repeat`` times, decided by ``seed`` alone.

    One sign covers several visual word tokens; a model that has read repeated words does not repeat its translation.
    """
    rng = random.Random(seed)
    return " ".join(word for word in gloss.split() for _ in range(rng.randint(1, max_repeat)))


def stable_seed(*parts: object) -> int:
    """63-bit seed from values: equal parts give equal seeds on every machine."""
    blob = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(blob, digest_size=8).digest(), "big") >> 1


@functools.lru_cache(maxsize=4)
def load_tokenizer(path: str) -> Any:
    """A Hugging Face tokenizer by folder or hub id; cached per process. Raises DataError when it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the loader raises many kinds; each means that this folder is no tokenizer
        raise DataError(
            f"cannot load a tokenizer ({type(error).__name__}: {error})", where=path, fix="name a Hugging Face folder"
        ) from error


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over vocabulary, merges, special ids and pre/post processing: equal means interchangeable token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    parts.pop("truncation", None)  # state of the last call, not part of the vocabulary
    parts.pop("padding", None)
    parts["bos_eos"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    parts["special"] = sorted(tokenizer.all_special_tokens)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def token_dtype(tokenizer: Any) -> np.dtype:
    """uint16 where every id fits, else uint32."""
    return np.dtype("<u2") if len(tokenizer) < 1 << 16 else np.dtype("<u4")


def tokenise(texts: Sequence[str], tokenizer: Any) -> list[np.ndarray]:
    """Token ids of each document: ``[bos] ids eos``; ``bos`` only when the tokenizer has one that is not ``eos``.

    Returns:
        One array [L] per document, dtype :func:`token_dtype`.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, so documents could not be told apart.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None:
        raise DataError(
            "no end-of-sequence token", where=str(tokenizer.name_or_path), fix="use the tokenizer of a causal LM"
        )
    start = [bos] if bos is not None and bos != eos else []
    dtype = token_dtype(tokenizer)
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.asarray([*start, *ids, eos], dtype=dtype) for ids in encoded]
