"""The corpora that ``slt shards build`` knows: name -> class. Adding one = a file here and a line below.

A corpus class has ``NAME``, takes its options as keyword arguments with defaults and type hints, and implements
``shards.schema.Corpus``. An optional attribute ``settings`` (dict) names options that change the samples' texts; it is
recorded in the manifest.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.schema import Corpus

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
    "table": "shards.corpora.table:Table",
    "text": "shards.corpora.text:Text",
    "parallel": "shards.corpora.parallel:Parallel",
    "hf_dataset": "shards.corpora.hf_dataset:HfDataset",
    "wiki": "shards.corpora.wiki:Wiki",
    "synthetic": "shards.corpora.synthetic:Synthetic",
}


def corpus_class(name: str) -> type:
    """The class registered under ``name``. Raises DataError with the nearest known name."""
    if name not in REGISTRY:
        raise DataError(f"unknown corpus {name!r}", where="corpus", fix=_nearest(name, sorted(REGISTRY)))
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def make_corpus(name: str, options: Mapping[str, Any]) -> Corpus:
    """Instantiate a corpus from options that may be strings, as a command line gives them.

    Strings are converted by the type hint of the keyword: numbers, booleans, paths; lists and dicts as JSON, or
    ``a,b`` for lists and ``key=value,key=value`` for dicts. Raises DataError naming an unknown, missing or wrong one.
    """
    cls = corpus_class(name)
    parameters = inspect.signature(cls).parameters
    hints = typing.get_type_hints(vars(cls)["__init__"])
    for key in options:
        if key not in parameters:
            raise DataError(f"unknown option {key!r}", where=f"corpus {name}", fix=_nearest(key, sorted(parameters)))
    missing = [key for key, value in parameters.items() if value.default is value.empty and key not in options]
    if missing:
        raise DataError(f"missing option {', '.join(missing)}", where=f"corpus {name}", fix=f"add --{missing[0]} VALUE")
    return cls(**{key: convert(value, hints.get(key, str), f"corpus {name}: {key}") for key, value in options.items()})


def convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the type ``hint`` asks for; values that are no strings pass unchanged."""
    if not isinstance(value, str):
        return value
    choices = (
        [part for part in typing.get_args(hint) or (hint,)] if typing.get_origin(hint) not in (list, dict) else [hint]
    )
    kinds = [typing.get_origin(choice) or choice for choice in choices]
    try:
        if dict in kinds:
            return json.loads(value) if value.startswith("{") else dict(pair.split("=", 1) for pair in value.split(","))
        if list in kinds:
            return json.loads(value) if value.startswith("[") else value.split(",")
        if bool in kinds:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if int in kinds and float not in kinds:
            return int(value)
        if float in kinds:
            return float(value)
    except (ValueError, KeyError) as error:
        expected = "/".join(kind.__name__ for kind in kinds if isinstance(kind, type) and kind is not type(None))
        raise DataError(f"{value!r} is not {expected} ({error})", where=where, fix="correct the option") from None
    return Path(value) if Path in kinds else value


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known: {', '.join(known)}"
