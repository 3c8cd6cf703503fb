"""Splits for corpora without published ones: a part of the samples, drawn by a hash of their names."""

from __future__ import annotations

from shards.errors import OptionError
from shards.text import stable_seed


def check_fractions(dev_fraction: float, test_fraction: float, where: str) -> None:
    """Raise OptionError unless both are >= 0 and their sum is at most 1."""
    if min(dev_fraction, test_fraction) < 0 or dev_fraction + test_fraction > 1:
        raise OptionError(
            f"dev_fraction {dev_fraction} + test_fraction {test_fraction} is not within 0..1",
            where=where,
            fix="choose fractions that leave something to train on",
        )


def drawn_split(name: str, seed: int, dev_fraction: float, test_fraction: float) -> str:
    """train, dev or test; depends on nothing but name, seed and fractions."""
    position = stable_seed(seed, name) / (1 << 63)
    if position < test_fraction:
        return "test"
    return "dev" if position < test_fraction + dev_fraction else "train"
