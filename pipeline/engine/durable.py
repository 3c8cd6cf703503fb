"""Files that are whole or absent, and errors that name a full disk."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from pipeline.errors import StorageError
from shards.atomic import write_atomic

# Texts of torch.save (both formats) and tokenizers for a full disk or an unwritable folder: errors without errno.
_FAILED_WRITES = (
    "inline_container", "PytorchStreamWriter", "iostream", "write()", "Parent directory", "cannot be opened",
    "os error",  # tokenizers, in Rust
)  # fmt: skip


@contextlib.contextmanager
def failed_writes_as_os_error(what: str) -> Iterator[None]:
    """A failed write inside becomes an OSError that names what was written: torch, safetensors and tokenizers
    raise their own errors for a full disk, and the error of an open file names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"while writing {what}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise OSError(f"while writing {what}: {error}") from error
    except Exception as error:
        if type(error) not in (RuntimeError, Exception) or not any(words in str(error) for words in _FAILED_WRITES):
            raise
        full = "" if "No space left" in str(error) else "the disk may be full: "
        raise OSError(f"while writing {what}: {full}{error}") from error


@contextlib.contextmanager
def named_if_unwritable(path: Path) -> Iterator[None]:
    """A failed write inside becomes a StorageError that names ``path`` (a file or the folder written to).

    Raises:
        StorageError: full disk, permissions and the like.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or path} could not be written: {error.strerror or error}; free space or change run_dir, "
            "then start the run again: it resumes from the last complete checkpoint"
        ) from error


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves either the old content or the new."""
    with failed_writes_as_os_error(path.name):
        write_atomic(path, text)


def sha256_of(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
