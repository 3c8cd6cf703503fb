"""New tokens for a language model: pieces of its tokenizer's own kind, and rows that start as the mean of the old ones.

A tokenizer could also look for added tokens before it does anything else; then a word would be cut out of longer words,
and a byte-level decoder would spell its umlauts wrong. So the pieces go into the model of the tokenizer: a BPE gets the
merges that make each word, ranked below all others; a unigram model (sentencepiece) gets it with just the score that
makes it win against its old pieces. A row is the mean of the rows of the old pieces (fast vocabulary transfer,
arXiv 2402.09977).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.schema import LlmConfig
from pipeline.errors import RecipeError
from pipeline.models.language import load_tokenizer
from pipeline.models.pretrained import check_vocabulary

log = logging.getLogger(__name__)

_WINS_BY = 0.01
"""What the log-probability of a new unigram piece is above that of its old pieces together."""


_ROUNDS = 8
"""Merges of one new word may cut another one differently: so often all words are looked at again."""


class NewPieces:
    """A tokenizer that is given more pieces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        text = tokenizer.backend_tokenizer.to_str()
        self.old = Tokenizer.from_str(text)
        self.content: dict[str, Any] = json.loads(text)
        """Of its tokenizer.json."""
        self.sources: dict[int, list[int]] = {}
        """New id -> ids of the old pieces that spell it."""
        self._model: dict[str, Any] = self.content["model"]
        self._place_added_tokens()
        self._held = set(self._ids())
        self._next = 1 + max(self._ids().values())

    def extend(self, forms: Iterable[str]) -> None:
        """Add these words, spelled as the tokenizer's model sees them; those it knows stay as they are."""
        missing = [form for form in dict.fromkeys(forms) if form not in self._held]
        if self._model["type"] != "BPE":
            for form in missing:
                self._add(form)
            return
        for character in sorted({character for form in missing for character in form} - self._held):
            self._add(character)
        for _ in range(_ROUNDS):
            now = Tokenizer.from_str(json.dumps(self.content))
            spelled = {form: [token.value for token in now.model.tokenize(form)] for form in missing}
            missing = [form for form, pieces in spelled.items() if len(pieces) > 1]
            for form in missing:
                self._merge(spelled[form])

    def _merge(self, pieces: list[str]) -> None:
        """Let a BPE make one piece of these, from the left."""
        merges, made = self._model["merges"], pieces[0]
        for piece in pieces[1:]:
            merges.append([made, piece] if not merges or isinstance(merges[0], list) else f"{made} {piece}")
            made += piece
            if made not in self._held:
                self._add(made)

    def _add(self, piece: str) -> None:
        spelled = [token.id for token in self.old.model.tokenize(piece)]
        if self._model["type"] == "BPE":
            self._model["vocab"][piece] = self._next
        else:
            vocabulary = self._model["vocab"]
            unknown = min(score for _, score in vocabulary) - 10.0  # as the library counts it
            scores = [unknown if at == self._model["unk_id"] else vocabulary[at][1] for at in spelled]
            vocabulary.append([piece, sum(scores) + _WINS_BY])
        self.sources[self._next] = spelled
        self._held.add(piece)
        self._next += 1

    def _place_added_tokens(self) -> None:
        """Added tokens keep their ids although the vocabulary grows beyond them: they get a place in it."""
        vocabulary, added = self._model["vocab"], sorted(self.content["added_tokens"], key=lambda token: token["id"])
        for token in added:
            if self._model["type"] == "BPE":
                vocabulary.setdefault(token["content"], token["id"])
            elif token["id"] == len(vocabulary):
                vocabulary.append([token["content"], min(score for _, score in vocabulary)])

    def _ids(self) -> dict[str, int]:
        vocabulary = self._model["vocab"]
        return vocabulary if isinstance(vocabulary, dict) else {held: at for at, (held, _) in enumerate(vocabulary)}


def read_words(file: Path) -> list[str]:
    """The words of a text file, one per line; empty lines are left out.

    Raises:
        RecipeError: it cannot be read, or holds none.
    """
    try:
        words = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        text = f"{file} cannot be read as UTF-8 text: {error}; give a file with one word per line"
        raise RecipeError(text) from error
    if not words:
        raise RecipeError(f"{file} holds no words; give one per line")
    return words


def extend(llm: str, words: Iterable[str], out: Path, spaces: bool = True) -> dict[str, int]:
    """Write a language model and its tokenizer with more words into a new folder. On the CPU, without an engine.

    Args:
        llm: Hugging Face folder or hub id.
        words: as they are spelled in texts.
        out: new folder.
        spaces: words stand behind a space; false: of a language written without.

    Returns:
        Word -> its id, of those that are new.

    Raises:
        RecipeError: the tokenizer's kind has no place for words, cannot make one of these of a single piece or does not
            spell it back, or the folder exists.
    """
    if out.exists():
        raise RecipeError(f"{out} exists; remove it, or name a new folder")
    tokenizer = load_tokenizer(LlmConfig(path=llm))
    kind = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"]
    if kind not in ("BPE", "Unigram"):
        raise RecipeError(f"{llm}: a {kind} tokenizer takes no further words; use a model with a BPE or unigram one")
    model = AutoModelForCausalLM.from_pretrained(llm, dtype="auto")
    check_vocabulary(model, tokenizer, llm)
    pieces = NewPieces(tokenizer)
    forms = {word: _form(pieces.old, word, spaces) for word in words}
    pieces.extend(forms.values())
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        tokenizer.save_pretrained(temporary)
        text = json.dumps(pieces.content, ensure_ascii=False)
        (temporary / "tokenizer.json").write_text(text, encoding="utf-8")
        new = _checked(tokenizer, load_tokenizer(LlmConfig(path=str(temporary))), forms, spaces)
        add_rows(model, pieces.sources)
        model.save_pretrained(temporary)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("%s: %d words, %d new pieces; shards of texts must be built again", out, len(new), len(pieces.sources))
    return new


def _form(old: Tokenizer, word: str, spaces: bool) -> str:
    """A word as the tokenizer's model sees it inside a text."""
    if not word or any(character.isspace() for character in word):
        raise RecipeError(f"{word!r} is no word: give words without spaces, one per line")
    head = _seen(old, "a")
    seen = _seen(old, "a " + word if spaces else "a" + word)
    form = "".join(seen).removeprefix("".join(head))
    if not form or not seen[-1].endswith(form):
        raise RecipeError(
            f"{word!r}: the tokenizer cuts it into {seen[-2:]} before it looks for pieces, so that no single piece can "
            "spell it; leave it out"
        )
    return form


def _seen(old: Tokenizer, text: str) -> list[str]:
    normal = text if old.normalizer is None else old.normalizer.normalize_str(text)
    return [normal] if old.pre_tokenizer is None else [part for part, _ in old.pre_tokenizer.pre_tokenize_str(normal)]


def _checked(
    old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, forms: dict[str, str], spaces: bool
) -> dict[str, int]:
    """New words and their ids, once the tokenizer as it is loaded from disk makes and spells them, and no old id moved.

    Raises:
        RecipeError: it does not; names the words.
    """
    before, now = old.get_vocab(), new.get_vocab()
    moved = sorted(token for token, at in before.items() if now.get(token) != at)
    if moved:
        raise RecipeError(
            f"the tokenizer gives old tokens other ids when it is loaded again: {_listed(moved)}; it cannot grow"
        )
    wrong = []
    for word, form in forms.items():
        text = f"a {word} b" if spaces else word
        as_before = _decoded(old, old.encode(word, add_special_tokens=False))  # perhaps in small letters
        made = now.get(form) in new.encode(text, add_special_tokens=False)
        if not made or _decoded(new, [now[form]]) not in (word, as_before):
            wrong.append(word)
    if wrong:
        raise RecipeError(
            f"the tokenizer does not make one piece of these words, or spells them otherwise: {_listed(wrong)}; leave "
            "them out"
        )
    return {word: now[form] for word, form in forms.items() if form not in before}


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids)).strip()


def _listed(words: list[str]) -> str:
    return ", ".join(words[:20]) + (f" and {len(words) - 20} more" if len(words) > 20 else "")


def add_rows(llm: PreTrainedModel, sources: dict[int, list[int]]) -> None:
    """Rows of the embedding table and the output head, tied or not, for new ids: the mean of those of the old pieces.

    Args:
        llm: its tables grow if they have no row for an id; rows that were only padding are used.
        sources: new id -> ids of the old pieces.
    """
    embedding: Any = llm.get_input_embeddings()
    rows = max([int(embedding.num_embeddings), *(at + 1 for at in sources)])
    llm.resize_token_embeddings(rows, mean_resizing=False)
    grown, head = cast(Any, llm.get_input_embeddings()), cast(Any, llm.get_output_embeddings())
    tables: list[Any] = [grown.weight, *([] if head.weight is grown.weight else [head.weight])]
    tables += [] if getattr(head, "bias", None) is None else [head.bias]
    with torch.no_grad():
        for table in tables:
            for at, of in sources.items():
                table[at] = table[of].float().mean(0).to(table.dtype)


__all__ = ["NewPieces", "add_rows", "extend", "read_words"]
