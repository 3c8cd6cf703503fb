"""Shared by the verbs of ``slt shards``: the app they register on, error reporting, common options.

Every module with verbs imports ``app`` from here; ``shards.cli.app`` imports these modules, so that one help lists all.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from shards.errors import DataError, OptionError

app = typer.Typer(
    help="Pack corpora into shards, index, check and describe them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
CORPUS_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
Filters = Annotated[
    list[str], typer.Option("--filter", help="leave texts out by a rule: min_words=3, exact_duplicates=true")
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
Workers = Annotated[int, typer.Option(min=0, help="processes, 0 = all cores; the result is the same for any number")]


def data_errors(verb: Callable[..., None]) -> Callable[..., None]:
    """A DataError ends the verb with a paragraph on stderr and its exit code: 4, or 2 for a wrong option."""

    @functools.wraps(verb)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except DataError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None

    return wrapped


def with_settings(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A verb whose last parameter ``settings`` is this dataclass: every field becomes an option.

    The fields are annotated like parameters of a verb: ``part: Annotated[str, typer.Option(help=...)] = ""``.
    """
    hints = typing.get_type_hints(settings, include_extras=True)
    fields = dataclasses.fields(settings)

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def wrapped(**values: Any) -> None:
            chosen = {field.name: values.pop(field.name) for field in fields}
            verb(**values, settings=settings(**chosen))

        own = [value for name, value in inspect.signature(verb, eval_str=True).parameters.items() if name != "settings"]
        options = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=hints[field.name]
            )
            for field in fields
        ]
        parameters = [value.replace(kind=inspect.Parameter.KEYWORD_ONLY) for value in own] + options
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {value.name: value.annotation for value in parameters}
        return wrapped

    return decorate


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default


def extra_options(arguments: list[str]) -> dict[str, str]:
    """``--media-root M --dev-fraction=0.1 --option signers=3`` as corpus options. Raises OptionError for other
    words and for a repeated option."""
    from shards.corpora import add_once

    options: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not (equals or rest):
            raise OptionError(f"cannot read {flag!r}", where="corpus options", fix="write --key value")
        value = value if equals else rest.pop(0)
        parsed = pairs([value], "--option") if name == "option" else {name.replace("-", "_"): value}
        for key, text in parsed.items():
            add_once(options, key, text, "corpus options")
    return options


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def pairs(values: list[str], flag: str) -> dict[str, str]:
    """``["a=1", "b=2"]`` as a dict. Raises OptionError naming ``flag`` for a value without ``=`` or a repeated key."""
    from shards.corpora import named_values

    return named_values(values, flag)


def print_notes(notes: list[str]) -> None:
    """Print the notes that a verb collected while it showed progress."""
    for note in notes:
        typer.echo(f"note: {note}", err=True)
