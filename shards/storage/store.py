"""Folders of shards: a directory, or a prefix of an object store behind fsspec (``s3://``, ``gs://``, ``memory://``).

Local paths never go through fsspec. Remote calls are retried a bounded number of times, with growing pauses, when the
cause may pass (5xx answers, resets, timeouts, cut answers). Objects and files appear complete or not at all.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from shards.atomic import put_file
from shards.errors import DataError
from shards.storage.files import copy_file, pieces

logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 10.0
_PART = 8 << 20
_LOCAL_BUFFER = 1 << 20
_PARTS_AT_ONCE = 8
_LASTING = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ImportError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError),
)
_LASTING_NAMES = frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"})
_S3 = ("s3", "s3a")

Result = TypeVar("Result")
Names = list[str]  # inside the classes `list` is their method
Chunks = list[bytes]
Entries = list[dict[str, Any]]


class StoreError(DataError):
    """The storage does not answer or is full. No single sample is to blame, so none is replaced by another."""


def is_remote(location: str | Path) -> bool:
    """Whether a location is a URL (``s3://bucket/set``) rather than a path."""
    return "://" in str(location) and not str(location).startswith("file://")


def open_folder(location: str | Path, storage_options: Mapping[str, object] | None = None) -> Folder:
    """The folder at a path or URL. Nothing is read, and the folder need not exist yet.

    Args:
        location: path, or a URL that fsspec understands.
        storage_options: passed to the fsspec file system (``endpoint_url``, ``key``, ``secret``, ``profile``); missing
            values come from the configuration files of fsspec and of the store.
    """
    if is_remote(location):
        return RemoteFolder(str(location), storage_options)
    return LocalFolder(Path(str(location).removeprefix("file://")))


class Folder(ABC):
    """Files directly inside one folder, by name. Every error is a DataError that names the file or URL."""

    location: str
    is_local: bool

    def join(self, name: str) -> str:
        """Path or URL of a file."""
        return f"{self.location}/{name}"

    def path(self, name: str) -> Path:
        """Local path of a file. Raises DataError for a remote folder."""
        raise DataError("not a local folder", where=self.location, fix="copy the folder to a disk, or pass a path")

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether the file is there."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def list(self, suffix: str = "") -> Names:
        """Names of the files that end in ``suffix``, sorted; none for a folder that does not exist."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole content of a file."""

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``offset`` on. Raises DataError when the file is shorter."""
        return self.read_ranges([(name, offset, size)])[0]

    @abstractmethod
    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Chunks:
        """The bytes of several (name, offset, size). Remote ranges are fetched concurrently."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file for sequential reading in large pieces, with few seeks."""

    @abstractmethod
    def write(self, name: str, payload: bytes) -> None:
        """Write a file; it appears complete or not at all."""

    @abstractmethod
    def upload(self, local: Path, name: str) -> None:
        """Copy a local file into the folder; it appears complete or not at all."""

    @abstractmethod
    def download(self, name: str, local: Path) -> str:
        """Copy a file to a local path, which appears complete or not at all. Returns the sha256 of its bytes."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file. A missing file is no error."""


class LocalFolder(Folder):
    """A directory."""

    is_local = True

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.location = str(root)

    def path(self, name: str) -> Path:
        return self.root / name

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def size(self, name: str) -> int:
        return self._guarded(name, lambda: (self.root / name).stat().st_size)

    def list(self, suffix: str = "") -> Names:
        if not self.root.is_dir():
            return []
        return sorted(entry.name for entry in self.root.iterdir() if entry.name.endswith(suffix) and entry.is_file())

    def read(self, name: str) -> bytes:
        return self._guarded(name, (self.root / name).read_bytes)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Chunks:
        return [self._guarded(span[0], partial(self._range, *span)) for span in ranges]

    def open(self, name: str) -> BinaryIO:
        return self._guarded(name, lambda: (self.root / name).open("rb", buffering=_LOCAL_BUFFER))

    def write(self, name: str, payload: bytes) -> None:
        self._guarded(name, lambda: put_file(self.root / name, lambda handle: handle.write(payload)))

    def upload(self, local: Path, name: str) -> None:
        self._guarded(name, lambda: copy_file(local, self.root / name))

    def download(self, name: str, local: Path) -> str:
        return self._guarded(name, lambda: copy_file(self.root / name, local))

    def delete(self, name: str) -> None:
        self._guarded(name, lambda: (self.root / name).unlink(missing_ok=True))

    def _range(self, name: str, offset: int, size: int) -> bytes:
        with (self.root / name).open("rb", buffering=0) as handle:
            data = b"".join(pieces(handle, offset, size))
        if len(data) < size:
            raise _short(self.join(name), offset, size, len(data))
        return data

    def _guarded(self, name: str, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except OSError as error:
            raise DataError(
                error.strerror or str(error), where=self.join(name), fix="check the path, its permissions and the disk"
            ) from error


class RemoteFolder(Folder):
    """A prefix of an object store. Safe to pickle and to use after a fork: each process connects by itself."""

    is_local = False

    def __init__(self, location: str, storage_options: Mapping[str, object] | None = None) -> None:
        self.location = location.rstrip("/")
        self.storage_options = dict(storage_options or {})
        self._connected: tuple[int, Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "storage_options": self.storage_options, "_connected": None}

    def exists(self, name: str) -> bool:
        return bool(self._call("look up", name, lambda fs, path: fs.isfile(path)))

    def size(self, name: str) -> int:
        return int(self._call("look up", name, lambda fs, path: fs.info(path))["size"])

    def list(self, suffix: str = "") -> Names:
        def entries(fs: Any, path: str) -> Entries:
            try:
                return list(fs.ls(path.rstrip("/"), detail=True))
            except FileNotFoundError:
                return []

        files = [entry for entry in self._call("list", "", entries) if entry["type"] == "file"]
        names = [str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in files]
        return sorted(name for name in names if name.endswith(suffix))

    def read(self, name: str) -> bytes:
        return bytes(self._call("read", name, lambda fs, path: fs.cat_file(path)))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Chunks:
        answers: Sequence[Any] = self._many(ranges) if len(ranges) > 1 else [None]
        return [
            data if isinstance(data, bytes) and len(data) == size else self._range(name, offset, size)
            for data, (name, offset, size) in zip(answers, ranges, strict=True)
        ]

    def open(self, name: str) -> BinaryIO:
        return io.BufferedReader(_Object(self, name, self.size(name)), _PART * 2)

    def write(self, name: str, payload: bytes) -> None:
        self._call("write", name, lambda fs, path: fs.pipe_file(path, payload))

    def upload(self, local: Path, name: str) -> None:
        def put(fs: Any, path: str) -> None:
            fs.put_file(str(local), path)
            fs.invalidate_cache()
            if (stored := fs.info(path)["size"]) != (size := local.stat().st_size):
                raise ConnectionError(f"{stored} of {size} bytes arrived")

        self._call("write", name, put)

    def download(self, name: str, local: Path) -> str:
        size, digest = self.size(name), hashlib.sha256()

        def fetch(handle: BinaryIO) -> None:
            for first in range(0, size, _PART * _PARTS_AT_ONCE):
                starts = range(first, min(first + _PART * _PARTS_AT_ONCE, size), _PART)
                for part in self.read_ranges([(name, start, min(_PART, size - start)) for start in starts]):
                    handle.write(part)
                    digest.update(part)

        try:
            put_file(local, fetch)
        except OSError as error:
            raise DataError(
                f"cannot write the copy of {self.join(name)} ({error.strerror})",
                where=str(local),
                fix="free some space",
            ) from error
        return digest.hexdigest()

    def delete(self, name: str) -> None:
        def remove(fs: Any, path: str) -> None:
            with suppress(FileNotFoundError):
                fs.rm_file(path)

        self._call("delete", name, remove)

    def _many(self, ranges: Sequence[tuple[str, int, int]]) -> Chunks:
        """All ranges in one request; a range that fails returns its exception and is read again alone."""
        fs, root = self._file_system()
        paths = [f"{root}/{name}" for name, _, _ in ranges]
        starts, ends = [start for _, start, _ in ranges], [start + size for _, start, size in ranges]
        return list(fs.cat_ranges(paths, starts, ends, on_error="return"))

    def _range(self, name: str, offset: int, size: int) -> bytes:
        def get(fs: Any, path: str) -> bytes:
            problem: Exception | None = None
            data = b""
            try:
                data = bytes(fs.cat_file(path, start=offset, end=offset + size)) if size else b""
            except Exception as error:
                problem = error
            if len(data) == size and problem is None:
                return data
            if fs.info(path)["size"] < offset + size:  # no retry makes the object longer
                raise _short(self.join(name), offset, size, len(data))
            raise problem or ConnectionError(f"the answer was cut after {len(data)} of {size} bytes")

        return self._call("read", name, get)

    def _file_system(self) -> tuple[Any, str]:
        """The fsspec file system of this process, and the folder's path in it."""
        if self._connected is None or self._connected[0] != os.getpid():
            try:
                self._connected = (os.getpid(), *_connect(self.location, self.storage_options))
            except (ImportError, ValueError) as error:
                raise DataError(
                    f"cannot use this kind of store ({error})",
                    where=self.location,
                    fix="install the fsspec package of the store (`pip install s3fs` for s3://) and check the options",
                ) from error
        return self._connected[1], self._connected[2]

    def _call(self, verb: str, name: str, call: Callable[[Any, str], Result]) -> Result:
        """``call(file system, path)``, retried while the cause may pass."""
        fs, root = self._file_system()
        path = f"{root}/{name}"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                fs.invalidate_cache()
                return call(fs, path)
            except DataError:
                raise
            except Exception as error:  # every store has exceptions of its own: botocore, aiohttp, google, azure
                problem = error
            if not _passing(problem) or attempt == ATTEMPTS:
                break
            pause = min(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.0)
            logger.warning("%s: %s failed (%s), again in %.1f s", self.join(name), verb, _short_name(problem), pause)
            time.sleep(pause)
        kind = DataError if isinstance(problem, FileNotFoundError) else StoreError
        raise kind(
            f"cannot {verb} the object after {attempt} attempt{'s' * (attempt > 1)} ({_short_name(problem)})",
            where=self.join(name),
            fix="check the URL, the credentials, the endpoint and the network",
        ) from problem


class _Object(io.RawIOBase):
    """An object as a seekable file."""

    def __init__(self, folder: Folder, name: str, size: int) -> None:
        self._folder, self._name, self._size, self._at = folder, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        ranges = [(self._name, start, min(_PART, end - start)) for start in range(self._at, end, _PART)]
        data = b"".join(self._folder.read_ranges(ranges)) if ranges else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _connect(location: str, storage_options: dict[str, Any]) -> tuple[Any, str]:
    import fsspec

    options = dict(storage_options)
    if location.startswith(tuple(f"{protocol}://" for protocol in _S3)):
        # the retries here are the only ones: three nested loops would turn a lasting failure into many minutes
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}} | options.get("config_kwargs", {})
        options["skip_instance_cache"] = True
    file_system, root = fsspec.core.url_to_fs(location, **options)
    if location.startswith(tuple(f"{protocol}://" for protocol in _S3)):
        file_system.retries = 1
    return file_system, root.rstrip("/")


def _passing(problem: Exception) -> bool:
    return not isinstance(problem, _LASTING) and type(problem).__name__ not in _LASTING_NAMES


def _short_name(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {problem}"[:300].rstrip(": ")


def _short(where: str, offset: int, size: int, received: int) -> DataError:
    return DataError(
        f"bytes {offset}..{offset + size} reach past the end, {received} of {size} came",
        where=where,
        fix="copy the file again, or rebuild the shard set",
    )
