"""Parse any WebDataset tar: every member with its payload address and checksum; any damage is an error.

Headers are parsed here rather than by ``tarfile``, which treats a damaged header after the first member as the end of
the archive and silently loses every later sample.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from isal.isal_zlib import crc32

from shards.errors import DataError
from shards.storage.store import Folder

BLOCK = 512
_CHUNK = 1 << 20
_WITHOUT_BYTES = {b"1": "a hard link", b"2": "a symbolic link", b"S": "a sparse file"}
_LONG_LINK_TARGET = b"K"
_LONGEST_NUMBER = 12  # a pax record is at most as long as its member, which is at most 8 GiB


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a tar: its name, the first payload byte, the payload size and its CRC-32."""

    name: str
    offset: int
    size: int
    crc32: int


def index_tar(path: Path | str, folder: Folder | None = None) -> list[Member]:
    """Every regular file of a tar with its payload address and CRC-32.

    Understands ustar, GNU long names and pax headers. Raises DataError naming shard and byte offset for a damaged
    header checksum, a truncated member, missing end-of-archive blocks, zeros where a header should be, or a link.

    Args:
        path: of the tar; with ``folder`` its name there.
        folder: holds the tar; an object store is read in large ranges.
    """
    place = Path(path) if folder is None else Path(folder.join(str(path)))
    try:
        with place.open("rb", buffering=_CHUNK) if folder is None else folder.open(str(path)) as handle:
            return _members(handle, place)
    except OSError as error:
        raise DataError(f"cannot read the shard ({error.strerror})", where=str(path), fix="check the path") from error


def _members(handle: BinaryIO, path: Path) -> list[Member]:
    members: list[Member] = []
    total = handle.seek(0, os.SEEK_END)
    position, long_name = 0, None
    while (block := _header(handle, position, total, path)) is not None:
        size, kind = _size(block, position, path), block[156:157]
        payload = position + BLOCK
        if payload + size > total:
            what = f"member of {size} bytes is cut off, the file ends at byte {total}"
            raise _damage(path, position, what, "truncated")
        if kind in b"Lxg":
            override = _override(kind, handle.read(size), position, path)
            long_name = override if kind in b"Lx" and override is not None else long_name
        elif kind in b"07\0":
            members.append(Member(long_name or _name(block), payload, size, _crc(handle, size, position, path)))
            long_name = None
        elif kind in _WITHOUT_BYTES:
            target = block[157:257].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            name = f"{long_name or _name(block)} is {_WITHOUT_BYTES[kind]}" + (f" to {target}" if target else "")
            raise _without_bytes(path, position, name)
        elif kind != _LONG_LINK_TARGET:
            long_name = None
        position = payload + -(-size // BLOCK) * BLOCK
    return members


def _without_bytes(path: Path, position: int, what: str) -> DataError:
    return DataError(
        f"link: {what}; a member needs its bytes in the tar",
        where=f"{path}@{position}",
        fix="write the tar again with `tar --hard-dereference --dereference` (in Python: tarfile's dereference=True)",
    )


def _damage(path: Path, position: int, what: str, rule: str) -> DataError:
    return DataError(
        f"{rule}: {what}", where=f"{path}@{position}", fix="copy this shard again, or delete the set and rebuild it"
    )


def _header(handle: BinaryIO, position: int, total: int, path: Path) -> bytes | None:
    """The header at ``position``, checksum verified; None at a proper end of archive."""
    handle.seek(position)
    block = handle.read(BLOCK)
    if len(block) < BLOCK:
        raise _damage(path, position, "the file ends without the two zero blocks that close a tar", "truncated")
    if not any(block):
        while chunk := handle.read(_CHUNK):
            if any(chunk):
                raise _damage(path, position, "zeros where a member header should be, data follows", "zero_hole")
        if total - position < 2 * BLOCK:
            raise _damage(path, position, "only one of the two zero blocks that close a tar", "truncated")
        return None
    stored = _number(block[148:156])
    if stored != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise _damage(path, position, "the member header does not match its checksum", "bad_header")
    return block


def _number(field: bytes) -> int | None:
    """Octal or base-256 number of a tar header; None when it is neither, or negative."""
    if field[0] & 0x80:
        return None if field[0] == 0xFF else int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):
        return None
    return int(digits or b"0", 8)


def _size(block: bytes, position: int, path: Path) -> int:
    size = _number(block[124:136])
    if size is None:
        raise _damage(path, position, f"unreadable member size {block[124:136]!r}", "bad_header")
    return size


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    prefix = (
        block[345:500].split(b"\0", 1)[0].decode("utf-8", "surrogateescape") if block[257:263] == b"ustar\0" else ""
    )
    return f"{prefix}/{name}" if prefix else name


def _override(kind: bytes, payload: bytes, position: int, path: Path) -> str | None:
    """The name given by a GNU long-name member or a pax record ``LEN path=VALUE``."""
    if kind == b"L":
        return payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
    at = 0
    while at < len(payload):
        digits, _, _ = payload[at : at + _LONGEST_NUMBER].partition(b" ")
        end = at + int(digits) if digits.isdigit() else at
        record = payload[at + len(digits) + 1 : end]
        if end > len(payload) or record[-1:] != b"\n":
            raise _damage(path, position, f"unreadable pax record {payload[at : at + 40]!r}", "bad_header")
        key, _, value = record[:-1].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        at = end
    return None


def _crc(handle: BinaryIO, size: int, position: int, path: Path) -> int:
    crc = 0
    while size:
        chunk = handle.read(min(size, _CHUNK))
        if not chunk:
            raise _damage(path, position, "the file became shorter while it was read", "truncated")
        crc, size = crc32(chunk, crc), size - len(chunk)
    return crc
