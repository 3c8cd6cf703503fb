"""The recipe's section `connector.prompts`: where the fields of `connector.prompt` get their texts from."""

from __future__ import annotations

import difflib
import re
from typing import Literal

from pydantic import Field

from pipeline.config.section import Section

FIELD = re.compile(r"\{([a-z][a-z_]*)\}")
"""A field of a prompt; other braces are text."""
VIDEO = "video"
CUES = ("language", "sign_language", "previous", "gloss", "example")
"""What a prompt may say of a sample besides its video, in the order in which random numbers are drawn for them."""

ANNOTATION = "annotation"
"""Value of `gloss.source`: the gloss of the index."""


class PreviousConfig(Section):
    column: str = "previous"
    """Text column with the sentences before each sample, the oldest first (`slt shards previous`)."""
    count: int = Field(default=1, gt=0)
    """Most sentences shown, the nearest ones."""
    dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability in training that `empty` stands there instead."""
    empty: str | None = None
    """What stands there when there is none; without it such a sample is an error."""
    source: Literal["reference", "predicted"] = "reference"
    """What `slt evaluate` shows: references, or the model's own translations of the sentences before."""


class GlossConfig(Section):
    source: str = "pseudo_gloss"
    """Text column (`slt shards pseudo-gloss`), or `annotation`: the gloss of the index."""
    dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability in training that `empty` stands there instead."""
    empty: str | None = None
    """What stands there when there is none; without it such a sample is an error."""
    held_out: Literal["empty", "source"] = "empty"
    """What evaluations show. A pseudo-gloss is made of the reference: `source` shows a part of the answer."""


class ExampleConfig(Section):
    count: int = Field(default=1, gt=0)
    """Examples per prompt."""
    pool: int = Field(default=64, gt=0)
    """Training samples they are taken from, drawn once by the seed; the export keeps them."""
    template: str = "{text}"
    """One example: `{text}` and `{gloss}` (as under `gloss.source`)."""
    dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability in training that `empty` stands there instead."""
    empty: str | None = None
    """What stands there instead; needed with `dropout`."""


class PromptsConfig(Section):
    """Where the fields of `connector.prompt` get their texts from, for each sample."""

    languages: dict[str, str] = {}
    """Name of every language code for `{language}` (`de: German`); empty: the codes themselves."""
    sign_languages: dict[str, str] = {}
    """The same for `{sign_language}`."""
    chat: bool = False
    """The prompt is the user's turn in the tokenizer's chat template, the text the assistant's (instruct models)."""
    system: str = ""
    """System turn before it; empty: none of our own."""
    previous: PreviousConfig = PreviousConfig()
    """`{previous}`: the sentences before."""
    gloss: GlossConfig = GlossConfig()
    """`{gloss}`: glosses or pseudo-glosses."""
    example: ExampleConfig = ExampleConfig()
    """`{example}`: texts of other training samples."""


def fields_of(prompt: str) -> list[str]:
    """The fields of a prompt, in order."""
    return FIELD.findall(prompt)


def cues_of(prompt: str) -> tuple[str, ...]:
    """The cues that a prompt shows, in the order of CUES."""
    found = set(fields_of(prompt))
    return tuple(name for name in CUES if name in found)


def prompt_problem(prompt: str) -> str:
    """Why a prompt cannot be one; empty if it can."""
    found = fields_of(prompt)
    if found.count(VIDEO) != 1:
        return f"{prompt!r} must contain {{video}} exactly once; it marks where the visual tokens go"
    known = (VIDEO, *CUES)
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            listed = ", ".join(f"{{{each}}}" for each in known)
            return f"{prompt!r}: {{{name}}} is no field" + (f"; did you mean {{{near[0]}}}?" if near else f": {listed}")
        if found.count(name) > 1:
            return f"{prompt!r} contains {{{name}}} more than once"
    return ""


def cue_problems(prompt: str, prompts: PromptsConfig) -> list[tuple[str, str]]:
    """(setting, what is wrong with it) of the cues that a prompt shows."""
    problems, shown = [], cues_of(prompt)
    left_out = {
        "previous": (prompts.previous.dropout, prompts.previous.empty),
        "gloss": (prompts.gloss.dropout, prompts.gloss.empty),
        "example": (prompts.example.dropout, prompts.example.empty),
    }
    for name, (dropout, empty) in left_out.items():
        if name in shown and dropout and empty is None:
            problems.append((f"{name}.empty", f"{name}.dropout={dropout:g} needs a text that stands there instead"))
    if "gloss" in shown and prompts.gloss.held_out == "empty" and prompts.gloss.empty is None:
        problems.append(("gloss.empty", "gloss.held_out=empty needs a text that evaluations show"))
    fields = fields_of(prompts.example.template)
    if "example" in shown and ("text" not in fields or not set(fields) <= {"text", "gloss"}):
        what = (
            f"example.template={prompts.example.template!r} must contain {{text}}, and no field but {{gloss}} besides"
        )
        problems.append(("example.template", what))
    if prompts.system and not prompts.chat:
        problems.append(("system", "system is a turn of a chat; set chat to true, or write it into connector.prompt"))
    return problems


def text_columns(prompt: str, prompts: PromptsConfig, train: bool) -> tuple[str, ...]:
    """The text columns that a prompt needs of every shard set."""
    shown, columns = cues_of(prompt), []
    if "previous" in shown:
        columns.append(prompts.previous.column)
    glosses = "gloss" in shown and (train or prompts.gloss.held_out == "source")
    glosses = glosses or (train and "example" in shown and "gloss" in fields_of(prompts.example.template))
    if glosses and prompts.gloss.source != ANNOTATION:
        columns.append(prompts.gloss.source)
    return tuple(columns)
