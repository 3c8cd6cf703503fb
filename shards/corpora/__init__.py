"""The corpora that ``slt shards build`` knows: name -> class. Adding one = a file here and a line below.

A corpus class has ``NAME``, takes its options as keyword arguments with defaults and type hints, and implements
``shards.schema.Corpus``. An optional attribute ``settings`` (dict) names options that change the samples' texts; it is
recorded in the manifest.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import itertools
import json
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import OptionError
from shards.names import existing
from shards.schema import Corpus

T = TypeVar("T")

REGISTRY = {
    "phoenix14t": "shards.corpora.phoenix14t:Phoenix14T",
    "csl_daily": "shards.corpora.csl_daily:CslDaily",
    "how2sign": "shards.corpora.how2sign:How2Sign",
    "openasl": "shards.corpora.openasl:OpenAsl",
    "wlasl": "shards.corpora.wlasl:Wlasl",
    "msasl": "shards.corpora.msasl:MsAsl",
    "youtube_asl": "shards.corpora.youtube_asl:YouTubeASL",
    "youtube_sl25": "shards.corpora.youtube_asl:YouTubeSL25",
    "bobsl": "shards.corpora.bobsl:Bobsl",
    "csl_news": "shards.corpora.csl_news:CslNews",
    "dailymoth": "shards.corpora.dailymoth:DailyMoth",
    "subtitles": "shards.corpora.subtitles:Subtitles",
    "table": "shards.corpora.table:Table",
    "text": "shards.corpora.text:Text",
    "parallel": "shards.corpora.parallel:Parallel",
    "hf_dataset": "shards.corpora.hf_dataset:HfDataset",
    "wiki": "shards.corpora.wiki:Wiki",
    "synthetic": "shards.corpora.synthetic:Synthetic",
}


def corpus_class(name: str) -> type:
    """The class registered under ``name``. Raises OptionError with the nearest known name."""
    if name not in REGISTRY:
        raise OptionError(f"unknown corpus {name!r}", where="corpus", fix=nearest(name, sorted(REGISTRY)))
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def make_corpus(name: str, options: Mapping[str, object]) -> Corpus:
    """Instantiate a corpus from options that may be strings, as a command line gives them.

    Strings are converted by the type hint of the keyword: numbers, booleans, paths; lists and dicts as JSON, or
    ``a,b`` for lists and ``key=value,key=value`` for dicts. Raises OptionError naming an unknown, missing or wrong one.
    """
    cls = corpus_class(name)
    parameters = inspect.signature(cls).parameters
    hints = typing.get_type_hints(vars(cls)["__init__"])
    for key in options:
        if key not in parameters:
            raise OptionError(f"unknown option {key!r}", where=f"corpus {name}", fix=nearest(key, sorted(parameters)))
    missing = [key for key, value in parameters.items() if value.default is value.empty and key not in options]
    if missing:
        raise OptionError(
            f"missing option {', '.join(missing)}", where=f"corpus {name}", fix=f"add --{missing[0]} VALUE"
        )
    values = {}
    for key, value in options.items():
        try:
            values[key] = convert(value, hints.get(key, str), f"corpus {name}: {key}")
        except OptionError as error:
            meaning = option_meanings(cls).get(key)
            fix = f"{error.fix} ({meaning})" if meaning else error.fix
            raise OptionError(error.what, where=error.where, fix=fix) from None
    return cls(**values)


def option_meanings(cls: type) -> dict[str, str]:
    """Descriptions of a corpus's options: the strings below its fields, and the ``Args`` of its docstring."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, docstring in itertools.pairwise(tree.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(docstring, ast.Expr)
                and isinstance(field.target, ast.Name)
            ):
                meanings[field.target.id] = inspect.cleandoc(ast.literal_eval(docstring.value))
        arguments = (ast.get_docstring(tree) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
        for name, meaning in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE):
            meanings[name] = meaning
    return {name: " ".join(meaning.split()) for name, meaning in meanings.items()}


def convert(value: object, hint: object, where: str) -> Any:
    """``value`` converted to the type ``hint``; values other than strings stay as they are. Raises OptionError."""
    if not isinstance(value, str):
        return value
    choices = typing.get_args(hint) if typing.get_origin(hint) not in (list, dict) else ()
    kinds = [typing.get_origin(choice) or choice for choice in choices or (hint,)]
    kind = next((kind for kind in _WRITTEN if kind in kinds), None)
    if kind is None:
        return existing(Path(value)) if Path in kinds else value
    name, example = _WRITTEN[kind]
    if Any in typing.get_args(hint):
        example += ', or as JSON {"key": ["value", "value"]}'
    try:
        return _READ[kind](value)
    except (ValueError, KeyError):
        raise OptionError(f"{value!r} is not {name}", where=where, fix=f"write {example}") from None
    except OptionError as error:
        raise OptionError(error.what, where=where, fix=f"write {example}") from None


def named_values(values: Iterable[str], where: str) -> dict[str, str]:
    """``["a=1", "b=2"]`` as a dict. Raises OptionError for a value without ``=`` and for a repeated key."""
    pairs: dict[str, str] = {}
    for pair in values:
        key, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"{pair!r} is not key=value", where=where, fix="write key=value")
        add_once(pairs, key, value, where)
    return pairs


def add_once(target: dict[str, T], key: str, value: T, where: str) -> None:
    """Set ``target[key]``. Raises OptionError if it is set already: the first value would be lost."""
    if key in target:
        raise OptionError(f"{key} is given twice: {target[key]!r} and {value!r}", where=where, fix="give it once")
    target[key] = value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members: dict[str, object] = {}
    for key, value in pairs:
        add_once(members, key, value, "")
    return members


def _read_dict(value: str) -> Mapping[str, object]:
    if value.startswith("{"):
        return json.loads(value, object_pairs_hook=_object)
    return named_values(value.split(","), "")


_WRITTEN: dict[type, tuple[str, str]] = {
    dict: ("a JSON object", "key=value,key=value"),
    list: ("a JSON list", 'value,value, or as JSON ["value", "value"]'),
    bool: ("true or false", "true or false"),
    float: ("a number", "a number, for example 0.5"),
    int: ("a whole number", "a whole number, for example 3"),
}
"""Type -> its name for users, how to write it. ``float`` comes before ``int``, which it includes."""
_READ: dict[type, Callable[[str], Any]] = {
    dict: _read_dict,
    list: lambda value: json.loads(value) if value.startswith("[") else value.split(","),
    bool: lambda value: {"true": True, "1": True, "false": False, "0": False}[value.lower()],
    float: float,
    int: int,
}


def nearest(name: str, known: list[str]) -> str:
    """The fix for an unknown name: the nearest known one, and all known ones."""
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(known)}"
