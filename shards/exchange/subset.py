"""Makes one shard set from another by copying bytes: the first samples of every split, or newly drawn splits.

Nothing is encoded or tokenised again: payloads are compared with their checksums and copied. The new set is verified
and then renamed to its name, so that it appears complete or not at all.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.errors import DataError, OptionError
from shards.exchange.copying import Report, Source, write_copy
from shards.format.opening import open_set
from shards.names import same_name
from shards.schema import SPLIT_NAME, Manifest
from shards.storage.store import open_folder

GROUPS = ("text", "signer")


def head(location: str | Path, out: Path, samples: int, on_progress: Report = None) -> Manifest:
    """Write the first ``samples`` samples of every split to the new folder ``out``.

    Raises:
        DataError: the set cannot be read, its bytes are damaged, or ``out`` is not empty.
    """
    if samples < 1:
        raise OptionError(f"{samples} samples per split", where="--samples", fix="ask for at least one")
    folder = open_folder(location)
    shard_set = open_set(folder)
    splits = np.asarray(shard_set.table["split"].to_pylist(), dtype=object)
    chosen = {split: np.flatnonzero(splits == split)[:samples].tolist() for split in sorted(set(splits))}
    how = {"verb": "head", "samples": samples}
    return write_copy(Source(folder, shard_set), Path(out), chosen, how, on_progress)


def split(
    location: str | Path,
    out: Path,
    fractions: Mapping[str, float],
    groups: Sequence[str] = ("text",),
    seed: int = 0,
    on_progress: Report = None,
) -> Manifest:
    """Write all samples to the new folder ``out`` with splits drawn anew.

    Args:
        location: the shard set; its own splits are forgotten.
        out: new folder.
        fractions: samples per split (``{"train": 0.9, "dev": 0.1}``); they add up to 1.
        groups: samples that share any of these (:data:`GROUPS`) go into the same split.
        seed: the same seed draws the same splits in any order of the samples; another seed draws others.
        on_progress: called with (samples done, samples in all).

    Raises:
        DataError: unusable fractions or groups, fewer groups than splits, damaged bytes, or ``out`` is not empty.
    """
    _check_fractions(fractions)
    folder = open_folder(location)
    shard_set = open_set(folder)
    names = assign_splits(shard_set.table, fractions, groups, seed)
    chosen = {name: np.flatnonzero(names == name).tolist() for name in sorted(fractions)}
    how = {"verb": "split", "fractions": dict(fractions), "groups": list(groups), "seed": seed}
    return write_copy(Source(folder, shard_set), Path(out), chosen, how, on_progress)


def _check_fractions(fractions: Mapping[str, float]) -> None:
    wrong = [name for name in fractions if not SPLIT_NAME.fullmatch(name)]
    if wrong:
        raise OptionError(
            f"{wrong[0]!r} is no name of a split", where="fractions", fix="use small letters, digits and _"
        )
    total = sum(fractions.values())
    if not fractions or min(fractions.values()) <= 0 or abs(total - 1) > 1e-6:
        what = f"{dict(fractions)} add up to {total:g}"
        raise OptionError(what, where="fractions", fix="use positive parts of 1: train=0.9,dev=0.1")


def assign_splits(table: pa.Table, fractions: Mapping[str, float], groups: Sequence[str], seed: int) -> NDArray[Any]:
    """Split of every sample [samples]: whole groups, the largest first, go to the split that lacks most samples.

    Raises:
        DataError: an unknown kind of group, samples without a signer, or fewer groups than splits.
    """
    members = _grouped(table, groups)
    if len(members) < len(fractions):
        raise DataError(
            f"{len(members)} groups by {' and '.join(groups) or 'sample'} cannot fill {len(fractions)} splits",
            where="split",
            fix="group by less, or make fewer splits",
        )
    ids = [f"{corpus}\0{name}" for corpus, name in zip(*_columns(table, "corpus", "sample_id"), strict=True)]

    def order(group: list[int]) -> tuple[int, bytes]:
        first = min(ids[number] for number in group)  # the position in the index must not matter
        return -len(group), hashlib.blake2b(f"{seed}\0{first}".encode(), digest_size=16).digest()

    samples_missing = {name: fraction * table.num_rows for name, fraction in fractions.items()}
    empty = set(fractions)
    names = np.empty(table.num_rows, dtype=object)
    waiting = sorted(members, key=order)
    for number, group in enumerate(waiting):
        candidates = empty if len(waiting) - number <= len(empty) else fractions  # every split gets at least one group
        name = max(candidates, key=lambda name: (samples_missing[name], name))
        names[group] = name
        samples_missing[name] -= len(group)
        empty.discard(name)
    return names


def _columns(table: pa.Table, *names: str) -> list[list[Any]]:
    return [table[name].to_pylist() for name in names]


def _grouped(table: pa.Table, groups: Sequence[str]) -> list[list[int]]:
    """Groups of samples that must stay together because they share a text or a signer."""
    unknown = [name for name in groups if name not in GROUPS]
    if unknown:
        raise OptionError(f"cannot group by {unknown[0]!r}", where="--group", fix=f"known: {', '.join(GROUPS)}")
    parents = list(range(table.num_rows))

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for name in groups:
        values = table["text_hash" if name == "text" else "signer"].to_pylist()
        if name == "signer" and "" in values:
            what = f"{values.count('')} of {len(values)} samples have no signer"
            raise DataError(what, where="--group signer", fix="group by text, or name the signers in the annotations")
        first: dict[Any, int] = {}
        for number, value in enumerate(values):
            parents[root(number)] = root(first.setdefault(same_name(value) if name == "signer" else value, number))
    members: dict[int, list[int]] = collections.defaultdict(list)
    for number in range(table.num_rows):
        members[root(number)].append(number)
    return list(members.values())
