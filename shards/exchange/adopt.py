"""Indexes existing tars: shards made by other programs, or a shard set that lost its index."""

from __future__ import annotations

import collections
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.exchange.layout import Note, TarSplits, folder_name, id_in_tar, is_one_tar, open_tars, repeating
from shards.exchange.rows import tar_rows
from shards.format.index import (
    INDEX_NAME,
    MANIFEST_NAME,
    file_sha256,
    fingerprint,
    read_manifest,
    rows_to_table,
    write_index,
)
from shards.schema import IndexRow, Kind, Manifest
from shards.storage.store import Folder

logger = logging.getLogger(__name__)
_TRAINING_NEEDS = {
    "features": ("features", "which backbone made them is unknown; extract them with `slt shards features`"),
    "text": ("tokenizer", "which tokenizer made the ids is unknown; build the texts with `slt shards build text`"),
}
"""Kind of shards -> the option that training needs in their manifest, and what to do if it is missing."""


def adopt(
    location: Path | str,
    corpus: str = "",
    on_progress: Callable[[int, int], None] | None = None,
    storage_options: Mapping[str, object] | None = None,
    split: str = "",
    on_note: Note = logger.warning,
) -> Manifest:
    """Write ``index.parquet`` and ``manifest.json`` for the tars of a folder.

    If ids repeat across tars, all ids of that corpus get the tar's name in front (``a/000001``).

    Args:
        location: folder or URL that holds ``*.tar``; shards of an object store are copied to a temporary folder one
            by one. What an existing manifest says about how the shards were made is kept.
        corpus: name for samples whose json does not give one; default: the folder's name.
        on_progress: called with (shards done, shards in all).
        storage_options: see :func:`shards.storage.store.open_folder`.
        split: for samples whose json does not give one; default: from the tars' names, see
            :class:`shards.exchange.layout.TarSplits`.
        on_note: receives notes on what was left out or assumed.

    Raises:
        DataError: no such folder, no tars, compressed ones, a damaged tar, a sample that cannot be used (see
            :mod:`shards.exchange.rows`), or a tar whose bytes an existing manifest knows to be different.
    """
    if is_one_tar(str(location)):
        raise DataError("a single file, a set is a folder", where=str(location), fix="pass the folder that holds it")
    folder, names = open_tars(location, storage_options, on_note)
    splits = TarSplits(names, folder_name(folder), split)
    rows: list[IndexRow] = []
    shards: list[dict[str, Any]] = []
    kinds: dict[Kind, str] = {}
    with tempfile.TemporaryDirectory(prefix="slt-adopt-") as scratch:
        existing = _manifest(folder, Path(scratch))
        for number, name in enumerate(names, 1):
            path, digest = _local(folder, name, Path(scratch))
            kind, tar_samples = tar_rows(path, corpus or folder_name(folder), splits)
            if tar_samples:
                kinds.setdefault(kind, name)
            rows += tar_samples
            shards.append({"name": name, "samples": len(tar_samples), "size": path.stat().st_size, "sha256": digest})
            if not folder.is_local:
                path.unlink()
            if on_progress is not None:
                on_progress(number, len(names))
        _check(existing, shards, kinds, str(location))
        _check_widths(rows, kinds)
        manifest = existing or Manifest(next(iter(kinds), "video"), options={"adopted": True})
        _write(folder, Path(scratch), manifest, shards, _unique_ids(rows, on_note))
    splits.tell(on_note)
    option, advice = _TRAINING_NEEDS.get(manifest.kind, ("", ""))
    if option and option not in manifest.options:
        on_note(f"no training on these: {MANIFEST_NAME} lacks options.{option}, {advice}")
    return manifest


def _unique_ids(rows: list[IndexRow], on_note: Note) -> list[IndexRow]:
    repeats = repeating(((row.shard, row.corpus, row.sample_id) for row in rows), on_note)
    return [
        row._replace(sample_id=id_in_tar(row.shard, row.sample_id)) if row.corpus in repeats else row for row in rows
    ]


def _write(
    folder: Folder, scratch: Path, manifest: Manifest, shards: list[dict[str, Any]], rows: list[IndexRow]
) -> None:
    """Complete the manifest and write it and the index beside the tars."""
    manifest.shards = shards
    manifest.splits = dict(sorted(collections.Counter(row.split for row in rows).items()))
    manifest.counts = manifest.counts or {"samples": len(rows), "skipped": 0}
    table = rows_to_table(rows)
    manifest.fingerprint = fingerprint(shards, table)
    target = folder.path("") if folder.is_local else scratch
    write_index(target, table, manifest)
    if not folder.is_local:
        for name in (INDEX_NAME, MANIFEST_NAME):  # the manifest last: with it the set is complete
            folder.upload(target / name, name)


def _manifest(folder: Folder, scratch: Path) -> Manifest | None:
    if not folder.exists(MANIFEST_NAME):
        return None
    if folder.is_local:
        return read_manifest(folder.path(""))
    folder.download(MANIFEST_NAME, scratch / MANIFEST_NAME)
    return read_manifest(scratch)


def _local(folder: Folder, name: str, scratch: Path) -> tuple[Path, str]:
    """A tar as a local file, and its sha256."""
    if folder.is_local:
        return folder.path(name), file_sha256(folder.path(name))
    return scratch / name, folder.download(name, scratch / name)


def _check_widths(rows: list[IndexRow], kinds: dict[Kind, str]) -> None:
    """Refuse features of several widths: a batch joins them."""
    if "features" not in kinds:
        return
    examples: dict[int, str] = {}
    for row in rows:
        examples.setdefault(row.width, f"{row.width} ({row.shard}:{row.key})")
        if not row.frames:
            raise DataError("features of no frame", where=f"{row.shard}:{row.key}", fix="remove the sample")
    if len(examples) > 1:
        what = f"features of several widths: {', '.join(examples.values())}"
        raise DataError(what, where=rows[0].shard, fix="put the features of each backbone into a folder of their own")


def _check(existing: Manifest | None, shards: list[dict[str, Any]], kinds: dict[Kind, str], where: str) -> None:
    if existing is not None and existing.shards != shards:
        listed = {old["name"] for old in existing.shards}
        changed = [new["name"] for new in shards if new not in existing.shards]
        missing = sorted(listed - {new["name"] for new in shards})
        problems = [
            f"{name}: " + ("not the bytes its manifest was written for" if name in listed else "not in the manifest")
            for name in changed
        ]
        problems += [f"{name} is missing" for name in missing]
        raise DataError(
            "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if problems[3:] else ""),
            where=where,
            fix="run `slt shards lint` to see the damage; delete manifest.json to accept the tars as they are",
        )
    if len(kinds) > 1:
        what = f"{' and '.join(kinds)} shards are mixed: {', '.join(kinds.values())}"
        raise DataError(what, where=where, fix="put them into folders of their own")
