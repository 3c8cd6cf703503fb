"""The sentence inside a document that a template made: ``signs: REGEN sentence: es regnet`` -> ``es regnet``.

Texts are compared by their sentences, so that a short test sentence is recognised inside a training pair.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence

from shards.text import fold_text


class Sentences:
    """Finds the texts that templates put into documents.

    Args:
        templates: as in ``shards.text.render_pair``; a template that is only the text is ignored.
    """

    def __init__(self, templates: Sequence[str]) -> None:
        patterns = [_pattern(template) for template in templates if "{text" in template]
        self._patterns = [pattern for pattern in dict.fromkeys(patterns) if pattern != _pattern("{text}")]

    def of(self, document: str) -> list[str]:
        """Folded texts (``shards.text.fold_text``) that the document may hold, without empty ones."""
        return [folded for text in self._matches(document) if (folded := fold_text(text))]

    def inner(self, document: str) -> str:
        """The text in a document of an evaluation split; the document itself if no template made it."""
        return next(self._matches(document), document)

    def _matches(self, document: str) -> Iterator[str]:
        for pattern in self._patterns:
            if match := re.fullmatch(pattern, document, re.DOTALL):
                yield match["text"]


def _pattern(template: str) -> str:
    """A regular expression for the documents of a template; a repeated field has the same value."""
    parts: list[str] = []
    seen: set[str] = set()
    for literal, name, _, _ in string.Formatter().parse(template.strip()):
        parts.append(re.escape(literal))
        if name is not None:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>.+?)")
            seen.add(name)
    return "".join(parts)
