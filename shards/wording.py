"""How counts and long lists are written in messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def listed(counts: Mapping[str, int]) -> str:
    """``train 7096, dev 519``."""
    return ", ".join(f"{name} {number}" for name, number in counts.items())


def first_few(names: Sequence[object], most: int) -> str:
    """``a, b, ...``: the first ``most`` names, and whether there are others."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def and_more(names: Sequence[str], most: int) -> str:
    """``a, b and 3 more``: the first ``most`` names, and how many others there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
