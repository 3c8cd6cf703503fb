"""Wikitext to plain text: paragraphs, headings and list items as lines, without tables, references, files, templates.

The parser is wikitextparser. Elements without running text are cut out before parsing, and lines that only control
the page after it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_CUT = "ref|references|gallery|math|chem|timeline|score|syntaxhighlight|source|imagemap|graph|mapframe|templatedata|pre"
_ELEMENT = re.compile(rf"<!--|-->|<(/?)({_CUT})\b[^<>]*?(/?)>", re.IGNORECASE)
_HEADING = re.compile(r"^(={1,6})[ \t]*(.*?)[ \t]*\1[ \t]*$")
_SWITCH = re.compile(r"__[A-Z]+__")
_BULLET = re.compile(r"^[*#:;]+\s*")
_EMPTY_BRACKETS = re.compile(r"[ \t]*[(\[][\s,;:/–-]*[)\]]")
_LANGUAGE_LINK = re.compile(r"^[a-z]{2,3}(-[a-z]+)*:\S")
FILES_AND_CATEGORIES = ("File", "Image", "Category")


def plain_text(markup: str, namespaces: Collection[str] = FILES_AND_CATEGORIES) -> str:
    """The readable text of a page.

    Args:
        markup: wikitext.
        namespaces: names of the file and category namespaces in the wiki's language; lines that only link to them are
            dropped.

    Returns:
        Lines; sections without text are left out with their headings.
    """
    import wikitextparser

    names = "|".join(re.escape(name) for name in namespaces)
    links = re.compile(rf"\[\[\s*(?:{names})\s*:[^\[\]]*\]\]", re.IGNORECASE)  # plain_text would keep a sort key
    parsed = wikitextparser.parse(links.sub("", _without_elements(markup)))
    text = parsed.plain_text(replace_tables=lambda table: "")
    drop = tuple(f"{name.casefold()}:" for name in namespaces)
    lines: list[str] = []
    headings: list[tuple[int, str]] = []
    for line in _SWITCH.sub("", text).splitlines():
        heading = _HEADING.match(line.strip())
        if heading is not None:
            level = len(heading[1])
            headings = [open_one for open_one in headings if open_one[0] < level] + [(level, heading[2])]
            continue
        line = _EMPTY_BRACKETS.sub("", _BULLET.sub("", line)).strip()
        if line.casefold().startswith(drop) or _LANGUAGE_LINK.match(line) or not any(map(str.isalnum, line)):
            continue
        lines += [name for _, name in headings if name]
        headings = []
        lines.append(line)
    return "\n".join(lines)


def _without_elements(markup: str) -> str:
    """``markup`` without comments and elements without running text, in one pass, even if some are left open."""
    kept: list[str] = []
    start = 0
    opening: re.Match[str] | None = None  # the opening mark of what is being left out
    for mark in _ELEMENT.finditer(markup):
        closes = mark[0] == "-->" or bool(mark[1])
        name = "" if mark[2] is None else mark[2].lower()
        if opening is not None:
            if closes and name == (opening[2] or "").lower():
                start, opening = mark.end(), None
            continue
        kept.append(markup[start : mark.start()])
        start = mark.end()
        if not closes and not mark[3]:
            opening = mark
    return "".join(kept) + markup[start:]
