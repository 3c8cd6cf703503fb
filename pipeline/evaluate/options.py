"""Command-line settings (``--set name=value``) -> option dataclasses, every problem in one message."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from pipeline.errors import RecipeError
from pipeline.inference.generate import GenerationOptions
from pipeline.inference.load import PRECISIONS, Precision
from shards.media.motion import SpanOptions

Options = TypeVar("Options")
_READ: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "str | None": str}
_CALLERS_BUSINESS = ("synced",)
"""Depends on how the model is held, not on the user's choice."""


@dataclass(frozen=True, slots=True)
class PlaceOptions:
    """Where a model runs."""

    device: str = "auto"
    precision: Precision = "auto"


@dataclass(frozen=True)
class LongOptions(SpanOptions, PlaceOptions):
    """What `--set` changes for long videos."""

    batch: int = 1
    """Sentences translated together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1:
            raise RecipeError(f"--set batch={self.batch}: at least one sentence is translated at once.")

    def spans(self) -> SpanOptions:
        """How sentences are found."""
        return SpanOptions(**{name: getattr(self, name) for name in SpanOptions.__dataclass_fields__})


def parse_sets(
    sets: Iterable[str], defaults: Options, reserved: Sequence[str] = ()
) -> tuple[GenerationOptions, Options]:
    """Read ``name=value`` settings of `GenerationOptions` and of another option dataclass.

    Args:
        sets: as on the command line; the last of equal names counts.
        defaults: the other dataclass, with its default values.
        reserved: its fields that are set elsewhere.

    Returns:
        The generation options (4 beams unless set, as in published systems) and ``defaults`` with the changes.

    Raises:
        RecipeError: lists all unknown names (with the nearest known one) and unreadable values.
    """
    generation = {f.name: str(f.type) for f in dataclasses.fields(GenerationOptions) if f.name not in _CALLERS_BUSINESS}
    fields: Any = dataclasses.fields(cast(Any, defaults))
    others = {f.name: str(f.type) for f in fields if f.name not in reserved}
    known = generation | others
    values: dict[str, Any] = {"num_beams": 4}
    problems = []
    for entry in sets:
        name, equals, text = entry.partition("=")
        if not equals or name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else f" Known: {', '.join(known)}"
            problems.append(f"--set {entry}: `{name}` is not a setting{hint}" if equals else f"--set {entry}: no `=`")
            continue
        try:
            values[name] = _precision(text) if name == "precision" else _READ[known[name]](text)
        except ValueError as error:
            problems.append(f"--set {entry}: {error}")
    if problems:
        raise RecipeError("\n".join(problems))
    changes = {name: value for name, value in values.items() if name in others}
    generation_options = GenerationOptions(**{name: value for name, value in values.items() if name in generation})
    return generation_options, dataclasses.replace(cast(Any, defaults), **changes)


def parse_between(text: str | None) -> tuple[float | None, float | None]:
    """``"12.5-20"`` -> (12.5, 20.0); either side may be empty; None = the whole video.

    Raises:
        RecipeError: not two increasing numbers of seconds.
    """
    if text is None:
        return None, None
    first, _, second = text.partition("-")
    try:
        start, end = (float(part) if part.strip() else None for part in (first, second))
    except ValueError:
        start, end = 1.0, 0.0
    if "-" not in text or (start is not None and end is not None and start >= end):
        raise RecipeError(f"--between {text}: give increasing seconds such as 12.5-20, 12.5- or -20.")
    return start, end


def _precision(text: str) -> str:
    if text not in PRECISIONS:
        raise ValueError(f"unknown precision, not one of {', '.join(PRECISIONS)}")
    return text
