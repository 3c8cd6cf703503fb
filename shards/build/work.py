"""Where a build keeps finished shards: a working folder beside the target, or a prefix of an object store.

Both keep a *part record* per shard: digest of the annotations, state of the sources, checksum, index rows and skips.
The record is written after the tar; a shard with a record is finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.atomic import sync_folder, write_atomic
from shards.build.encoded import Stored
from shards.build.layout import ShardTask
from shards.errors import DataError, OptionError
from shards.format.index import INDEX_NAME, MANIFEST_NAME, read_manifest, write_index
from shards.format.writer import TarWriter
from shards.schema import FrameFolder, IndexRow, Manifest, Media
from shards.storage.store import Folder, is_remote, open_folder

SKIPPED_NAME = "skipped.jsonl"
_PLAN_NAME, _LOCK_NAME, _PARTS, _STATE, _WRITING = "build.json", "lock", "parts", ".building", "writing-"
_PART_NAME = re.compile(r"part-(\d+)-of-(\d+)\.lock")
Identity = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Share ``number`` (from 1) of the shards, divided into ``of`` shares."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """``3/8``. Raises OptionError for anything else."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise OptionError(
                f"{text!r} is no share", where="--part", fix="write I/N with 1 <= I <= N, for example 1/8"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def has(self, task: ShardTask) -> bool:
        """Whether the shard belongs to this share."""
        return task.number % self.of == self.number - 1


def open_work(
    out: Path | str, scratch: Path | None = None, storage_options: Mapping[str, object] | None = None
) -> LocalWork | RemoteWork:
    """The work place for a target path or URL; ``scratch`` holds shards before their upload to an object store."""
    if is_remote(out):
        return RemoteWork(str(out), scratch, storage_options)
    return LocalWork(Path(os.path.abspath(str(out).removeprefix("file://"))))


class Sources:
    """Sizes and modification times of media, to notice a replaced file. Costs one stat per file."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Path, str], list[Any]] = {}

    def digest(self, task: ShardTask) -> str:
        """Digest of the state of every source of a shard, missing ones included."""
        states = [self._state(segment.media) for segment in task.segments if segment.media is not None]
        return hashlib.sha256(json.dumps(states).encode()).hexdigest()

    def _state(self, media: Media) -> list[Any]:
        key = media.path, media.pattern if isinstance(media, FrameFolder) else ""
        if key not in self._seen:
            if isinstance(media, FrameFolder):
                self._seen[key] = [_stat(path) for path in sorted(media.path.glob(media.pattern))]
            else:
                self._seen[key] = _stat(media.path)
        return self._seen[key]


def _stat(path: Path) -> list[Any]:
    try:
        status = path.stat()
    except OSError:
        return [path.name]
    return [path.name, status.st_size, status.st_mtime_ns]


def part_record(tar: TarWriter, stored: Stored, task: ShardTask, sources: str) -> bytes:
    """The part record of a finished shard, as JSON."""
    part = {
        "digest": task.digest,
        "sources": sources,
        "size": tar.size,
        "sha256": tar.digest.hexdigest(),
        "skips": [dataclasses.asdict(skip) for skip in [*task.skips, *stored.skips]],
        "tallies": stored.tallies,
        "rows": [list(row) for row in stored.rows],
    }
    return json.dumps(part).encode()


def check_same(begun: Identity, identity: Identity, where: str, fix: str) -> None:
    """Raise DataError if this build differs from the one begun there; names the differing options."""
    groups = ("options", "versions")
    names = {(group, key) for group in groups for key in begun.get(group, {}).keys() | identity[group].keys()}
    differing = sorted(key for group, key in names if begun.get(group, {}).get(key) != identity[group].get(key))
    if differing:
        raise DataError(f"holds a build made otherwise; different: {', '.join(differing)}", where=where, fix=fix)


def _finished(manifest: Manifest, identity: Identity, where: str) -> Manifest:
    """The manifest of a complete target of this build; DataError if it is another build's."""
    keys = manifest.options.keys() | identity["options"].keys()
    differing = sorted(key for key in keys if manifest.options.get(key) != identity["options"].get(key))
    if differing:
        raise DataError(
            f"holds a shard set made otherwise; different: {', '.join(differing)}",
            where=where,
            fix="choose another --out, or delete this folder first",
        )
    return manifest


class LocalWork:
    """``.<out>.building`` beside the target folder, renamed to the target at the very end.

    The parts of an array job may work in it at the same time, on a file system that their machines share.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.dir = out.with_name(f".{out.name}.building")
        self.target, self.where = str(out), str(self.dir)

    def finished(self, identity: Identity) -> Manifest | None:
        """The manifest when the target holds this build; None when there is nothing yet; DataError otherwise."""
        out = self.out
        if os.path.ismount(out):
            raise DataError(
                "the folder is a mount point and cannot be renamed to", where=str(out), fix=f"use {out}/shards"
            )
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
        if not (out / MANIFEST_NAME).is_file():
            raise OptionError("not empty and not a shard set", where=str(out), fix="choose another --out")
        return _finished(read_manifest(out), identity, str(out))

    @contextlib.contextmanager
    def session(self, identity: Identity, part: Part | None) -> Iterator[None]:
        """Lock the working folder, alone or for one part, and remove the files of another build."""
        self.dir.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as locks:
            self._lock(locks, _LOCK_NAME, alone=part is None)
            if part is not None:
                self._lock(locks, f"part-{part.number}-of-{part.of}.lock", alone=True)
            plan, plan_bytes = self.dir / _PLAN_NAME, json.dumps(identity, indent=1, sort_keys=True).encode()
            if not plan.exists() or plan.read_bytes() != plan_bytes:
                if part is None:
                    self._clear(set())
                elif plan.exists():
                    fix = "wait for it, or delete this folder"
                    check_same(json.loads(plan.read_bytes()), identity, self.where, fix)
                write_atomic(plan, plan_bytes)
            elif part is None:
                for left in self.dir.glob(f"{_WRITING}*"):  # tars that a killed run was writing
                    shutil.rmtree(left)
            (self.dir / _PARTS).mkdir(exist_ok=True)
            yield

    def _lock(self, locks: contextlib.ExitStack, name: str, alone: bool) -> None:
        handle = locks.enter_context((self.dir / name).open("a+"))  # NFS shares a lock only for reading
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                "another build is writing here", where=str(self.dir), fix="wait for it, or choose another --out"
            ) from None

    def only_rename_missing(self, identity: Identity) -> bool:
        """Whether the build was stopped between its last file and its final name."""
        return (self.dir / MANIFEST_NAME).exists() and read_manifest(self.dir).options == identity["options"]

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new folder for a tar being written, on the same file system."""
        folder = self.dir / f"{_WRITING}{secrets.token_hex(6)}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def store(self, tar: TarWriter, name: str, rows: list[IndexRow], record: bytes) -> None:
        """Keep a finished shard; from here on an interrupted build does not write it again."""
        if rows:
            tar.path.rename(self.dir / name)
        else:
            (self.dir / name).unlink(missing_ok=True)
        sync_folder(self.dir)
        write_atomic(self.dir / _PARTS / f"{name}.json", record)

    def read_part(self, name: str) -> dict[str, Any] | None:
        """A finished shard's record, when its tar is there as well."""
        path = self.dir / _PARTS / f"{name}.json"
        if not path.exists():
            return None
        part = json.loads(path.read_bytes())
        tar = self.dir / name
        if part["rows"] and not (tar.exists() and tar.stat().st_size == part["size"]):
            return None
        return part

    def parts(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(shard name, record) of every finished shard, sorted by name."""
        for path in sorted((self.dir / _PARTS).glob("*.tar.json")):
            yield path.name.removesuffix(".json"), json.loads(path.read_bytes())

    def shares(self) -> set[int]:
        """Into how many parts the runs so far were split."""
        return {int(match[2]) for path in self.dir.iterdir() if (match := _PART_NAME.fullmatch(path.name))}

    def finish(self, table: pa.Table, manifest: Manifest, skipped: bytes) -> None:
        """Write skipped.jsonl, index.parquet and, last, manifest.json."""
        write_atomic(self.dir / SKIPPED_NAME, skipped)
        write_index(self.dir, table, manifest)

    def list_skipped(self, skipped: bytes) -> str:
        """Write skipped.jsonl of a build that fails; returns its place."""
        write_atomic(self.dir / SKIPPED_NAME, skipped)
        return str(self.dir / SKIPPED_NAME)

    def publish(self) -> Manifest:
        """Give the finished folder its name."""
        manifest = read_manifest(self.dir)
        names = {shard["name"] for shard in manifest.shards}
        self._clear(names | {INDEX_NAME, MANIFEST_NAME, SKIPPED_NAME})
        (self.dir / _LOCK_NAME).unlink(missing_ok=True)
        self.dir.rename(self.out)
        sync_folder(self.out.parent)
        return manifest

    def _clear(self, keep: set[str]) -> None:
        for entry in self.dir.iterdir():
            if entry.name in keep or entry.name == _LOCK_NAME:
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=entry.name == _PARTS and bool(keep))
            else:
                entry.unlink()


class RemoteWork:
    """A prefix of an object store: shards go to their final place, part records to ``.building/`` below it.

    There is no lock. Objects appear complete and every build of the same corpus and options writes the same bytes, so
    two builds into one prefix waste work and do no harm.
    """

    def __init__(self, location: str, scratch: Path | None, storage_options: Mapping[str, object] | None) -> None:
        self.folder: Folder = open_folder(location, storage_options)
        self.state: Folder = open_folder(f"{location.rstrip('/')}/{_STATE}", storage_options)
        self.target = self.where = self.folder.location
        self.base = scratch
        self._stored: set[str] = set()
        self._recorded: set[str] = set()

    def finished(self, identity: Identity) -> Manifest | None:
        """The manifest when the prefix holds this build; None when there is nothing yet; DataError otherwise."""
        if self.folder.exists(MANIFEST_NAME):
            with self.scratch() as folder:
                (folder / MANIFEST_NAME).write_bytes(self.folder.read(MANIFEST_NAME))
                manifest = read_manifest(folder)
            self._forget()  # a run that was killed after its last object leaves them
            return _finished(manifest, identity, self.where)
        if self.folder.list() and not self.state.exists(_PLAN_NAME):
            raise OptionError("not empty and not a shard set", where=self.where, fix="choose another --out")
        return None

    @contextlib.contextmanager
    def session(self, identity: Identity, part: Part | None) -> Iterator[None]:
        """Check that the prefix belongs to this build; objects of another build are never deleted."""
        plan_bytes = json.dumps(identity, indent=1, sort_keys=True).encode()
        if self.state.exists(_PLAN_NAME):
            fix = "choose another --out, or delete this prefix first"
            check_same(json.loads(self.state.read(_PLAN_NAME)), identity, self.where, fix)
        else:
            self.state.write(_PLAN_NAME, plan_bytes)
        if part is not None:
            self.state.write(f"part-{part.number}-of-{part.of}.lock", b"")
        self._stored = set(self.folder.list(".tar"))
        self._recorded = {name.removesuffix(".json") for name in self.state.list(".tar.json")}
        yield

    def only_rename_missing(self, identity: Identity) -> bool:
        """Never: the manifest is the last object."""
        del identity
        return False

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder for a tar being written."""
        if self.base is not None:
            self.base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="slt-build-", dir=self.base) as folder:
            yield Path(folder)

    def store(self, tar: TarWriter, name: str, rows: list[IndexRow], record: bytes) -> None:
        """Upload a finished shard, then its record."""
        if rows:
            self.folder.upload(tar.path, name)
        else:
            self.folder.delete(name)
        self.state.write(f"{name}.json", record)

    def read_part(self, name: str) -> dict[str, Any] | None:
        """A finished shard's record, when its tar is there as well."""
        if name not in self._recorded:
            return None
        part = json.loads(self.state.read(f"{name}.json"))
        return None if part["rows"] and name not in self._stored else part

    def parts(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(shard name, record) of every finished shard, sorted by name."""
        for name in self.state.list(".tar.json"):
            yield name.removesuffix(".json"), json.loads(self.state.read(name))

    def shares(self) -> set[int]:
        """Into how many parts the runs so far were split."""
        return {int(match[2]) for name in self.state.list(".lock") if (match := _PART_NAME.fullmatch(name))}

    def finish(self, table: pa.Table, manifest: Manifest, skipped: bytes) -> None:
        """Write skipped.jsonl, index.parquet and, last, manifest.json."""
        with self.scratch() as folder:
            write_index(folder, table, manifest)
            self.folder.write(SKIPPED_NAME, skipped)
            self.folder.upload(folder / INDEX_NAME, INDEX_NAME)
            self.folder.upload(folder / MANIFEST_NAME, MANIFEST_NAME)

    def list_skipped(self, skipped: bytes) -> str:
        """Write skipped.jsonl of a build that fails; returns its place."""
        self.state.write(SKIPPED_NAME, skipped)
        return self.state.join(SKIPPED_NAME)

    def publish(self) -> Manifest:
        """Delete the part records; the manifest made the shard set complete."""
        self._forget()
        with self.scratch() as folder:
            (folder / MANIFEST_NAME).write_bytes(self.folder.read(MANIFEST_NAME))
            return read_manifest(folder)

    def _forget(self) -> None:
        for name in self.state.list():
            self.state.delete(name)


@contextlib.contextmanager
def disk_errors(where: str) -> Iterator[None]:
    """Turn file system errors into DataErrors with a fix."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(
                "the disk is full" if error.errno != errno.EFBIG else "a file may not grow so large (ulimit -f)",
                where=where,
                fix="free some space and run the same command again: finished shards are kept",
            ) from error
        raise DataError(f"cannot write ({error})", where=where, fix="choose a folder you can write to") from error


Work = LocalWork | RemoteWork
