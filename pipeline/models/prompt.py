"""Prompt templates: `connector.prompt` as pieces of text and fields, and the texts that stand in the fields.

A template is compiled once: a plain one as it is written, one of a chat through the tokenizer's own chat template, with
marks where the fields are. Filled, it is a list of parts, each either the author's (its control tokens are commands) or
data (previous sentences, glosses, examples: whatever they spell, they are characters).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.prompt_schema import FIELD, VIDEO, PromptsConfig, cues_of, prompt_problem
from pipeline.errors import RecipeError
from shards.errors import DataError

STAND_IN = "X"
"""Rendered in place of the video while a prompt is tokenised; its tokens are dropped."""
_OPEN, _CLOSE = "\ue000", "\ue001"  # private use: no chat template writes them, and none takes them apart
_ANSWER = f"{_OPEN}answer{_CLOSE}"

Cues = Mapping[str, str]
"""The text in every field of a prompt but its video."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a filled prompt."""

    text: str
    data: bool = False
    video: bool = False


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A compiled prompt.

    Attributes:
        pieces: author's texts and names of fields, in turn: text, field, text, ..., text.
        end: what the chat template writes behind an answer; empty for a plain prompt.
        chat: whether the answer follows at once, without a space.
    """

    pieces: tuple[str, ...]
    end: str = ""
    chat: bool = False

    @classmethod
    def of(cls, tokenizer: Any, prompt: str, prompts: PromptsConfig) -> PromptTemplate:
        """The template of a recipe's prompt.

        Raises:
            RecipeError: its fields are not what they must be, or the tokenizer has no chat template that shows them.
        """
        if problem := prompt_problem(prompt):
            raise RecipeError(f"connector.prompt: {problem}.")
        if not prompts.chat:
            return cls(tuple(FIELD.split(prompt.rstrip())))
        return _chat_template(tokenizer, prompt, prompts.system)

    def filled(self, cues: Cues) -> list[Part]:
        """Author's texts, cues and the video's stand-in, in order. An empty cue takes the space in front of it along.
        KeyError without one of the cues."""
        parts = [Part(self.pieces[0])]
        for field, text in zip(self.pieces[1::2], self.pieces[2::2], strict=True):
            if field == VIDEO:
                parts.append(Part(STAND_IN, video=True))
            elif value := cues[field].strip():
                parts.append(Part(value, data=True))
            elif parts[-1].text.endswith(" ") and not parts[-1].data:
                parts[-1] = Part(parts[-1].text[:-1])
            elif not any(part.text for part in parts):
                text = text.removeprefix(" ")
            parts.append(Part(text))
        return [part for part in parts if part.text]


def _chat_template(tokenizer: Any, prompt: str, system: str) -> PromptTemplate:
    marked = FIELD.sub(lambda found: f"{_OPEN}{found[1]}{_CLOSE}", prompt)
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": marked})
    where = "connector.prompts.chat"
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            f"{where}: the tokenizer of model.llm has no chat template: it is no instruct model's. Set chat to false"
            " and write the turns into connector.prompt."
        )
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        answered = [*turns, {"role": "assistant", "content": _ANSWER}]
        end = str(tokenizer.apply_chat_template(answered, tokenize=False)).partition(_ANSWER)[2]
    except Exception as error:  # jinja's own errors, and those that templates raise
        raise RecipeError(
            f"{where}: the tokenizer's chat template refuses a {'system and a ' if system else ''}user turn ({error})."
            " Leave system empty, or set chat to false and write the turns into connector.prompt."
        ) from error
    pieces = [part for opened in text.split(_OPEN) for part in opened.split(_CLOSE)]
    if sorted(pieces[1::2]) != sorted(FIELD.findall(prompt)):
        raise RecipeError(
            f"{where}: the tokenizer's chat template does not show the user's turn as it is, once. Set chat to false"
            " and write the turns into connector.prompt."
        )
    return PromptTemplate(tuple(pieces), end.strip(), chat=True)


def example_text(template: str, text: str, gloss: str) -> str:
    """One example as a prompt shows it."""
    values = {"text": text.strip(), "gloss": gloss.strip()}
    return FIELD.sub(lambda found: values[found[1]], template)


def empty_texts(prompt: str, prompts: PromptsConfig) -> dict[str, str]:
    """What stands in the fields of a prompt that may be empty."""
    texts = {
        "previous": prompts.previous.empty,
        "gloss": prompts.gloss.empty,
        "example": prompts.example.empty,
    }
    return {name: text for name in cues_of(prompt) if (text := texts.get(name)) is not None}


def language_name(field: str, code: str, prompts: PromptsConfig, where: str) -> str:
    """What `{language}` or `{sign_language}` shows for a code. Raises DataError for one without a name."""
    names = prompts.languages if field == "language" else prompts.sign_languages
    if not code:
        fix = "name it in the annotations, or leave the field out of connector.prompt"
        raise DataError(f"connector.prompt shows {{{field}}}, but the {field} is not known", where=where, fix=fix)
    if names and code not in names:
        fix = f"add `{code}: NAME` to connector.prompts.{field}s, which names {', '.join(sorted(names))}"
        raise DataError(f"the {field} {code!r} has no name", where=where, fix=fix)
    return names.get(code, code)


def value_of(field: str, texts: Sequence[str], empty: Mapping[str, str], where: str) -> str:
    """What another cue shows: its texts, or the text for none. Raises DataError where there is neither."""
    shown = " ".join(text.strip() for text in texts if text.strip())
    if not shown and field not in empty:
        fix = f"give what stands there instead: connector.prompts.{field}.empty"
        raise DataError(f"connector.prompt shows {{{field}}}, but there is none", where=where, fix=fix)
    return shown or empty[field]
