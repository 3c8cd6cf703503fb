"""Names of all recipe settings, the nearest valid one for a misspelt one, and the class of each section."""

from __future__ import annotations

import difflib
import functools
import re
import typing
from collections.abc import Iterator

from pydantic import BaseModel

from pipeline.config.schema import Recipe


@functools.lru_cache(maxsize=1)
def setting_names() -> tuple[str, ...]:
    """Every dotted setting of a recipe, list items written as ``N`` (``data.train.N.shards``), keys as ``NAME``."""
    return tuple(_walk(Recipe, ""))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path
        inner, is_list = section_of(info.annotation)
        if inner is not None:
            item = "N." if is_list else "NAME." if typing.get_origin(info.annotation) is dict else ""
            yield from _walk(inner, f"{path}.{item}")


def section_of(annotation: object) -> tuple[type[BaseModel] | None, bool]:
    """The section class inside an annotation such as ``list[SourceConfig]``, and whether it is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    is_list = typing.get_origin(annotation) is list
    for argument in typing.get_args(annotation):
        inner, inner_list = section_of(argument)
        if inner is not None:
            return inner, is_list or inner_list
    return None, False


def general_name(path: str) -> str:
    """``data.train.0.shards`` -> ``data.train.N.shards``, ``train.parts.llm.lr`` -> ``train.parts.NAME.lr``."""
    named = re.sub(r"(?<=^train\.parts\.).+(?=\.\w+$)", "NAME", path)
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", named)


def nearest_setting(path: str) -> str | None:
    """The valid setting that a misspelt dotted path most likely means: a sibling, the same word elsewhere, or None."""
    general = general_name(path)
    parent, _, leaf = general.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in setting_names() if name.rpartition(".")[0] == parent]
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if close:
        return f"{path.rpartition('.')[0]}.{close[0]}" if parent else close[0]
    elsewhere = [name for name in setting_names() if name.rpartition(".")[2] == leaf]
    if elsewhere:
        return difflib.get_close_matches(general, elsewhere, n=1, cutoff=0.0)[0]
    whole = difflib.get_close_matches(general, setting_names(), n=1, cutoff=0.75)
    return whole[0] if whole else None


def nearest(word: str, words: typing.Iterable[str]) -> str:
    """`` ; did you mean X?`` for the closest of ``words``, or an empty string."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


# Words that name a secret, and endings of words that do (HFTOKEN, PGPASSWORD).
_SECRET_WORDS = frozenset({"KEY", "KEYS", "PASS", "PWD", "PAT", "SAS"})
_SECRET_ENDINGS = (
    "TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWORDS", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS",
    "APIKEY", "APIKEYS",
)  # fmt: skip
# Next to these words a token or key is something counted or measured (MAX_TOKEN, KEY_FRAMES).
_MEASURES = frozenset({
    "MAX", "MIN", "NUM", "N", "COUNT", "LIMIT", "LENGTH", "LEN", "BUDGET", "SIZE", "RATE", "FRAME", "FRAMES",
    "INTERVAL", "DROPOUT", "WEIGHT",
})  # fmt: skip


def is_secret(name: str) -> bool:
    """Whether a variable or option of this name holds a secret: HF_TOKEN does, SLT_MAX_TOKENS does not."""
    words = [word for word in re.split(r"[^A-Z]+", name.upper()) if word]
    if not _MEASURES.isdisjoint(words):
        return False
    return any(word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS) for word in words)


__all__ = ["general_name", "is_secret", "nearest", "nearest_setting", "section_of", "setting_names"]
