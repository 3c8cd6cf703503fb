"""What a shard set on this machine says of itself, and whether it is whole and holds what a source asks for.

Reads its manifest, the footer or single columns of its index, names and sizes of its files; opens no shard.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.names import nearest
from pipeline.config.schema import SourceConfig
from pipeline.config.source import Problem

if TYPE_CHECKING:
    import pyarrow as pa

MOST_SIZES = 1_000
"""Shards whose size is compared, evenly spread: on network storage every one costs a request."""


@dataclass(frozen=True, slots=True)
class SetFacts:
    """What is known of a sound shard set."""

    kind: str
    splits: dict[str, int]
    """Samples per split."""
    shards: dict[str, int]
    """Name -> bytes."""
    options: dict[str, Any] = field(default_factory=dict)
    """How it was built."""


def folder_of(source: SourceConfig) -> Path:
    """Where a set on this machine lies."""
    return Path(source.shards.removeprefix("file://"))


def open_source(place: str, source: SourceConfig, kinds: tuple[str, ...], field: str = "shards") -> SetFacts | Problem:
    """The set of a source, or the first thing that is wrong with it.

    Args:
        place: where the recipe names the source, ``data.train.0``.
        source: one on this machine.
        kinds: what the stage reads.
        field: of the source, that names the set.
    """
    folder, name = folder_of(source), f"{place}.{field}"
    what = f"{name}={source.shards}"
    if not folder.is_dir():
        return Problem(f"{what} does not exist; build it with `slt shards build`, or correct the path", (name,))
    missing = [file for file in ("manifest.json", "index.parquet") if not (folder / file).is_file()]
    if missing:
        return Problem(f"{what} has no {missing[0]}: not a shard set, or its build did not finish", (name,))
    try:
        facts = _facts(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Problem(f"{what}: its manifest.json cannot be read ({error!r}); copy or build the set again", (name,))
    if facts.kind not in kinds:
        return Problem(f"{what} holds {facts.kind}, but this stage reads {' or '.join(kinds)}", (name,))
    if text := _incomplete(folder, facts):
        return Problem(f"{what}: {text}; copy the set again", (name,))
    if not facts.splits.get(source.split):
        full = {split: count for split, count in sorted(facts.splits.items()) if count}
        available = ", ".join(f"{split} ({count})" for split, count in full.items()) or "no samples at all"
        hint = nearest(source.split, full)
        return Problem(f"{place}.split={source.split}: {source.shards} has {available}{hint}", (f"{place}.split", name))
    return _index_problem(place, source, facts) or facts


def _facts(folder: Path) -> SetFacts:
    manifest: Any = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return SetFacts(
        str(manifest["kind"]),
        {str(split): int(count) for split, count in manifest["splits"].items()},
        {str(shard["name"]): int(shard["size"]) for shard in manifest["shards"]},
        dict(manifest.get("options") or {}),
    )


def _incomplete(folder: Path, facts: SetFacts) -> str:
    """Which shards are missing or cut short; empty if none is."""
    present, names = {path.name for path in folder.iterdir()}, list(facts.shards)
    count = len(names)
    if absent := [shard for shard in names if shard not in present and not (folder / shard).is_file()]:
        return f"{len(absent)} of its {count} shards are missing, first {absent[0]}"
    for shard in {names[number * count // min(count, MOST_SIZES)]: None for number in range(min(count, MOST_SIZES))}:
        size = (folder / shard).stat().st_size
        if size != facts.shards[shard]:
            return f"{shard} has {size} bytes, its manifest says {facts.shards[shard]}"
    return ""


def _index_problem(place: str, source: SourceConfig, facts: SetFacts) -> Problem | None:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    name = f"{place}.shards"
    try:
        rows = pq.read_metadata(folder_of(source) / "index.parquet").num_rows
    except (OSError, pa.ArrowException) as error:
        return Problem(f"{place}.{_unreadable(source, error)}", (name,))
    if rows != (samples := sum(facts.splits.values())):
        text = f"{name}={source.shards}: its index.parquet has {rows} rows, its manifest says {samples} samples"
        return Problem(f"{text}; copy the set again, or write it again with `slt shards index`", (name,))
    if source.corpus is None:
        return None
    table = columns(source, ["corpus"])
    if isinstance(table, Problem):
        return Problem(f"{place}.{table.text}", (name,))
    known = pc.unique(table["corpus"]).to_pylist()
    if source.corpus in known:
        return None
    available = ", ".join(sorted(known))
    text = f"{place}.corpus={source.corpus}: split {source.split} of {source.shards} has {available}"
    return Problem(f"{text}{nearest(str(source.corpus), known)}", (f"{place}.corpus", name))


def columns(source: SourceConfig, names: list[str]) -> pa.Table | Problem:
    """Columns of the index, for the source's split only."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(folder_of(source) / "index.parquet", columns=sorted({"split", *names}))
    except (OSError, pa.ArrowException) as error:
        return Problem(_unreadable(source, error))
    return table.filter(pc.equal(table["split"], source.split))


def column_of(source: SourceConfig, name: str) -> pa.ChunkedArray | Problem:
    """A column of the index, for the samples of the source only."""
    import pyarrow.compute as pc

    table = columns(source, [name, *(["corpus"] if source.corpus is not None else [])])
    if isinstance(table, Problem):
        return table
    return (table if source.corpus is None else table.filter(pc.equal(table["corpus"], source.corpus)))[name]


def _unreadable(source: SourceConfig, error: Exception) -> str:
    return f"shards={source.shards}: its index.parquet cannot be read ({error}); copy or build it again"


__all__ = ["MOST_SIZES", "SetFacts", "column_of", "folder_of", "open_source"]
