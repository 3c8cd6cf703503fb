"""Texts are data: one that spells a control token (``</s>``, ``<|im_start|>``) becomes the characters it consists of.

Tokenizers look for their control tokens in every text. Asking them to split those (``split_special_tokens`` in
transformers) is not enough: a unigram or word-level model finds the piece in its vocabulary all the same, NFKC makes
one of full-width characters, and added tokens that are not flagged as special are never split.

So a text is tokenised as ever, and only when control ids come out it is tokenised again, by a copy of the tokenizer
whose control tokens have names that no text spells. What an author writes around a text, a prompt or a prefix, is no
data: the control tokens in it mean what they say.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shards.errors import DataError

_UNSPELLED = "\U0010ffff"  # a noncharacter, which Unicode bars from texts
# An added token that is not flagged as special may be a word of a larger vocabulary; between brackets it is none.
_BRACKETED = re.compile(r"[<\[].*\w.*[>\]]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a text and what was written around it."""

    ids: list[int]
    own: list[bool]
    """Whether a token belongs to the text itself: not to its head, and not put in by the tokenizer."""


@dataclass(frozen=True, slots=True)
class JoinedTokens:
    """Token ids of several parts that were tokenised as one text."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """First character of each token in ``text``, and the one behind it."""
    text: str
    bounds: list[tuple[int, int]]
    """The same of every part."""


class TextTokens:
    """A tokenizer for texts that are data.

    Args:
        tokenizer: a fast Hugging Face tokenizer.

    Raises:
        DataError: it is a slow one.
    """

    def __init__(self, tokenizer: Any) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise DataError(
                f"a slow tokenizer ({type(tokenizer).__name__}), which tells no offsets and not every control token",
                where=str(tokenizer.name_or_path),
                fix="convert it to a tokenizer.json",
            )
        self.tokenizer = tokenizer
        self.controls: dict[int, str] = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or _BRACKETED.fullmatch(token.content)
        }

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, without those that a tokenizer puts around one."""
        found: list[list[int]] = self._encoded(list(texts))["input_ids"] if texts else []
        spelling = [number for number, ids in enumerate(found) if not self.controls.keys().isdisjoint(ids)]
        if spelling:
            again = self._splitting(0).encode_batch([_data(texts[n]) for n in spelling], add_special_tokens=False)
            for number, encoding in zip(spelling, again, strict=True):
                found[number] = encoding.ids
        return found

    def behind(self, head: str, text: str, *, special: bool = False, most: int = 0) -> Tokens:
        """``text`` as it is tokenised behind ``head``, whose control tokens are commands.

        Args:
            head: what an author wrote in front of the text; may be empty.
            text: the data.
            special: with the tokens that the tokenizer puts around a text.
            most: cut to so many tokens, those around it included; 0: all.
        """
        cut = {"truncation": True, "max_length": most} if most else {}
        options = {"return_offsets_mapping": True, "return_special_tokens_mask": True, **cut}
        found = self._encoded(head + text, special, **options)
        ids, own = list(found["input_ids"]), _own(found["offset_mapping"], found["special_tokens_mask"], len(head))
        if any(mine and number in self.controls for number, mine in zip(ids, own, strict=True)):
            head = self._commands(head)
            again = self._splitting(most).encode(head + _data(text), add_special_tokens=special)
            ids, own = again.ids, _own(again.offsets, again.special_tokens_mask, len(head))
        return Tokens(ids, own)

    def joined(self, parts: Sequence[tuple[str, bool]]) -> JoinedTokens:
        """Parts as one text, tokenised as a whole: (text, whether it is data) each. Control tokens of the parts that an
        author wrote are commands; what data spell are characters."""
        found = self._joined([text for text, _ in parts])
        data = [bounds for bounds, (_, is_data) in zip(found.bounds, parts, strict=True) if is_data]
        if any(
            number in self.controls and any(a < end and start < b for start, end in data)
            for number, (a, b) in zip(found.ids, found.offsets, strict=True)
        ):
            texts = [_data(text) if is_data else self._commands(text) for text, is_data in parts]
            encoding = self._splitting(0).encode("".join(texts), add_special_tokens=False)
            return JoinedTokens(encoding.ids, encoding.offsets, "".join(texts), _bounds(texts))
        return found

    def _joined(self, texts: list[str]) -> JoinedTokens:
        whole = "".join(texts)
        found = self._encoded(whole, return_offsets_mapping=True)
        return JoinedTokens(list(found["input_ids"]), list(found["offset_mapping"]), whole, _bounds(texts))

    def spelled(self, text: str) -> list[str]:
        """The control tokens that the tokenizer reads in a text, each once, in the order of the text."""
        unknown = self.tokenizer.unk_token_id
        found = dict.fromkeys(number for number in self._encoded(text)["input_ids"] if number in self.controls)
        return [self.controls[n] for n in found if n != unknown or self.controls[n] in text]

    def _encoded(self, texts: Any, special: bool = False, **options: Any) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            verbose=False,
            split_special_tokens=False,
            **options,
        )

    def _commands(self, head: str) -> str:
        """``head`` with its control tokens under the names that the copy knows them by."""
        longest_first = sorted(self.controls.values(), key=len, reverse=True)
        return re.sub("|".join(map(re.escape, longest_first)), lambda found: _name(found[0]), head)

    def _splitting(self, most: int) -> Any:
        copy = _copy(self.tokenizer, tuple(self.controls.items()))
        if most:
            copy.enable_truncation(most, direction=self.tokenizer.truncation_side)
        else:
            copy.no_truncation()
        return copy


def _own(offsets: Sequence[tuple[int, int]], special: Sequence[int], head: int) -> list[bool]:
    return [not put_in and end > head for put_in, (_, end) in zip(special, offsets, strict=True)]


def _bounds(texts: Sequence[str]) -> list[tuple[int, int]]:
    ends = list(itertools.accumulate(map(len, texts)))
    return list(zip([0, *ends], ends, strict=False))


def _name(control: str) -> str:
    return f"{_UNSPELLED}{control}{_UNSPELLED}"


def _data(text: str) -> str:
    """A text cannot use the names of the copy either."""
    return text.replace(_UNSPELLED, "\ufffd")


@functools.lru_cache(maxsize=2)
def _copy(tokenizer: Any, controls: tuple[tuple[int, str], ...]) -> Any:
    """The tokenizer's backend with the same ids and other names of its control tokens."""
    from tokenizers import Tokenizer

    names = {content: _name(content) for _, content in controls}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _spells(merge, names, model)]
    copy = Tokenizer.from_str(json.dumps(state))
    assert all(copy.token_to_id(names[content]) == number for number, content in controls), "the copy has other ids"
    return copy


def _spells(merge: Sequence[str], names: Mapping[str, str], model: Mapping[str, Any]) -> bool:
    """Whether a merge makes a control token, or takes one."""
    left, right = merge
    return bool({left, right, left + right.removeprefix(model.get("continuing_subword_prefix") or "")} & names.keys())
