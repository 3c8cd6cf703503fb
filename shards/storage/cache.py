"""The shards of remote sets on a local disk, shared by all processes of a host.

Layout::

    cache_dir/
      space.lock                    held while room is made
      NAME-URLHASH-FINGERPRINT/     one folder per remote set: a shard set with the shards fetched so far
        manifest.json index.parquet remote.json
        train-000000.tar            complete: size and sha256 are those of the manifest
        train-000000.tar.lock       held while the shard is downloaded
        train-000000.tar.part       reserves the room of a download

Locks are ``flock``: the kernel drops them when a process dies, so the next download cleans up after a killed one. Only
complete shards are ever read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.errors import DataError
from shards.storage.store import Folder, StoreError, open_folder

logger = logging.getLogger(__name__)

MANIFEST_NAME, INDEX_NAME, REMOTE_NAME = "manifest.json", "index.parquet", "remote.json"
_GIB = 1 << 30
_POLL_SECONDS = 0.05
WAIT_SECONDS = 600.0
"""Longest wait for another process: its download, or a shard it is reading."""


def mirror(
    location: str,
    cache_dir: Path,
    storage_options: Mapping[str, object] | None = None,
    columns: Sequence[str] = (),
) -> Path:
    """The local folder of a remote shard set, with its manifest and index; the shards come when they are read.

    Args:
        location: URL of the shard set.
        cache_dir: on this host; its layout is above.
        storage_options: see :func:`shards.storage.store.open_folder`.
        columns: further files of the set that shall be there; one that is there is not fetched again, as
            another content takes another name.

    Raises:
        DataError: there is no manifest or no such file at the URL, or the set cannot be read.
    """
    remote = open_folder(location, storage_options)
    try:
        fingerprint = str(json.loads(remote.read(MANIFEST_NAME))["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"unreadable manifest ({type(error).__name__}: {error})",
            where=remote.join(MANIFEST_NAME),
            fix="copy the shard set to the store again",
        ) from error
    name = location.rstrip("/").rpartition("/")[2]
    place = hashlib.sha256(location.rstrip("/").encode()).hexdigest()[:8]
    folder = Path(cache_dir) / f"{name}-{place}-{fingerprint[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / (REMOTE_NAME + ".lock")):
        if not (folder / REMOTE_NAME).exists():
            for file in (INDEX_NAME, MANIFEST_NAME):
                remote.download(file, folder / file)
            values = {"location": location.rstrip("/"), "fingerprint": fingerprint}
            open_folder(folder).write(REMOTE_NAME, json.dumps(values).encode())
        for file in columns:
            _fetch_once(remote, file, folder / file)
    copied = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["fingerprint"]
    if copied != fingerprint:  # the set was rebuilt between the two reads
        shutil.rmtree(folder)
        raise DataError(
            "the shard set changed while it was opened",
            where=location,
            fix="wait until its build or upload has finished; build into a new folder",
        )
    return folder


def _fetch_once(remote: Folder, file: str, target: Path) -> None:
    if target.exists():
        return
    if not remote.exists(file):
        fix = "make it on a copy of the set on a disk, and copy it to the store, too"
        raise DataError("no such file in the shard set", where=remote.join(file), fix=fix)
    partial = target.with_suffix(".part")
    remote.download(file, partial)
    partial.rename(target)


def remote_of(folder: Path, storage_options: Mapping[str, object] | None = None) -> Folder | None:
    """The remote folder that a mirror stands for; None for an ordinary shard set."""
    try:
        values = json.loads((folder / REMOTE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return open_folder(values["location"], storage_options)


class ShardCache:
    """Whole shards of one mirror, downloaded when they are first opened.

    Args:
        folder: what :func:`mirror` returned.
        remote: where the shards come from.
        limit_gib: limit on all shards in the cache folder, over all sets.
    """

    def __init__(self, folder: Path, remote: Folder, limit_gib: float) -> None:
        self.folder, self.remote, self.limit = folder, remote, int(limit_gib * _GIB)
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        self._damaged: dict[str, DataError] = {}  # these shards are not downloaded again
        self.entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in manifest["shards"]}

    def open(self, name: str) -> int:
        """A file descriptor of a complete shard, locked against eviction until :func:`unpin` or close."""
        path = self.folder / name
        while True:
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch(name)
                continue
            if pin(handle):
                os.utime(handle)
                return handle
            os.close(handle)  # evicted between the two calls

    def holds(self, name: str) -> bool:
        """Whether the shard is here already."""
        return (self.folder / name).exists()

    def fetch(self, name: str) -> None:
        """Download a shard unless it is here; one process of the host downloads, the others wait.

        Raises DataError: it cannot be downloaded, is not what the manifest says, or there is no room for it.
        """
        path, entry = self.folder / name, self._entry(name)
        if name in self._damaged:
            raise self._damaged[name]
        with _locked(path.with_name(name + ".lock")):
            if path.exists():
                return
            part = path.with_name(name + ".part")
            self._reserve(part, int(entry["size"]))
            try:
                begin = time.monotonic()
                for attempt in (1, 2):
                    digest = self.remote.download(name, part)
                    if digest == entry["sha256"] and part.stat().st_size == entry["size"]:
                        break
                    if attempt == 2:
                        self._damaged[name] = DataError(
                            f"sha256 {digest} of {part.stat().st_size} bytes, the manifest says {entry['sha256']} of "
                            f"{entry['size']} bytes",
                            where=self.remote.join(name),
                            fix="the object was changed or damaged: copy the shard to the store again",
                        )
                        raise self._damaged[name]
                    logger.warning("%s: not the bytes of the manifest, downloading again", self.remote.join(name))
                part.rename(path)
                logger.debug("%s: %d bytes in %.1f s", path, entry["size"], time.monotonic() - begin)
            finally:
                part.unlink(missing_ok=True)

    def discard(self, name: str, handle: int) -> None:
        """Remove the copy that ``handle`` has open, because its bytes are wrong; a newer copy stays."""
        path = self.folder / name
        with _locked(path.with_name(name + ".lock")):
            try:
                if os.path.samestat(path.stat(), os.fstat(handle)):
                    path.unlink()
            except FileNotFoundError:
                return

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.entries:
            raise DataError(
                "the index names a shard that the manifest does not list",
                where=f"{self.folder}/{name}",
                fix="run `slt shards lint URL` and rebuild the set",
            )
        return self.entries[name]

    def _reserve(self, part: Path, size: int) -> None:
        """Reserve room for a download; evict the least recently used shards if needed."""
        root = self.folder.parent
        if size > self.limit:
            raise StoreError(
                f"a shard of {size / _GIB:.2f} GiB does not fit into a cache of {self.limit / _GIB:.2f} GiB",
                where=str(part),
                fix="raise data.cache_gib, or read ranges with data.access: ranged",
            )
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            with _locked(root / "space.lock"):
                missing = _make_room(root, size, self.limit)
                if missing <= 0:
                    with part.open("wb") as handle:
                        handle.truncate(size)  # counts as taken from now on, without writing
                    return
            if time.monotonic() > deadline:
                raise StoreError(
                    f"no room for a shard of {size / _GIB:.2f} GiB: {missing / _GIB:.2f} GiB are missing, and "
                    "everything in the cache is being read or the disk is full",
                    where=str(root),
                    fix="raise data.cache_gib to hold a few shards per process, free some disk, or use fewer workers",
                )
            time.sleep(_POLL_SECONDS)


def pin(handle: int) -> bool:
    """Lock an open shard against eviction; False when it has been evicted already."""
    fcntl.flock(handle, fcntl.LOCK_SH)
    return os.fstat(handle).st_nlink > 0


def unpin(handle: int) -> None:
    """Allow eviction again; the descriptor stays readable."""
    fcntl.flock(handle, fcntl.LOCK_UN)


def _make_room(root: Path, size: int, limit: int) -> int:
    """Evict until ``size`` more bytes fit; returns the bytes still missing (0 or less = it fits)."""
    shards = []
    taken = 0
    for path in root.glob("*/*.tar*"):
        if path.suffix == ".lock":
            continue
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if path.suffix == ".tar":
            shards.append((status.st_mtime_ns, path, status.st_size))
        elif _abandoned(path):
            path.unlink(missing_ok=True)
            continue
        if path.suffix != ".tmp":  # its room is what its .part reserves
            taken += status.st_size

    def missing() -> int:
        return max(taken + size - limit, size - shutil.disk_usage(root).free)

    for _, path, bytes_ in sorted(shards):
        if missing() <= 0:
            break
        if _evicted(path):
            taken -= bytes_
    return missing()


def _evicted(path: Path) -> bool:
    """Remove a shard unless a process reads it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if not _try_lock(handle):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(handle)


def _abandoned(partial: Path) -> bool:
    """Whether no process is downloading this partial file any more."""
    lock = partial.with_name(partial.name.partition(".tar")[0] + ".tar.lock")
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        return _try_lock(handle)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; waits for whoever holds it, at most WAIT_SECONDS."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    deadline = time.monotonic() + WAIT_SECONDS
    try:
        while not _try_lock(handle):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"another process has held this lock for {WAIT_SECONDS:.0f} s",
                    where=str(path),
                    fix="look for a hung download; the lock goes when its process ends",
                )
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(handle)
