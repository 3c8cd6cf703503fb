"""What happens to shards in the world, done to real tars. Not a test."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from shards.format.tar import BLOCK, Member, index_tar

Damage = Callable[[Path, list[Member]], None]


def _write(path: Path, place: int, data: bytes) -> None:
    with path.open("r+b") as handle:
        handle.seek(place)
        handle.write(data)


def _flip(path: Path, place: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 0x40]))


def _cut(path: Path, size: int) -> None:
    with path.open("r+b") as handle:
        handle.truncate(size)


def _video(members: list[Member], number: int) -> Member:
    return [member for member in members if member.name.endswith(".mp4")][number]


def cut_inside_a_member(path: Path, members: list[Member]) -> None:
    """A copy that stopped in the middle of the third video."""
    video = _video(members, 2)
    _cut(path, video.offset + video.size // 2)


def cut_on_a_member_boundary(path: Path, members: list[Member]) -> None:
    """A copy that stopped exactly before the header of the third sample."""
    _cut(path, members[4].offset - BLOCK)  # two members a sample


def bad_header(path: Path, members: list[Member]) -> None:
    """One byte of the name in the header of the second video."""
    _flip(path, _video(members, 1).offset - BLOCK + 1)


def hole_on_a_header(path: Path, members: list[Member]) -> None:
    """A page of 4 KiB that was never written, over the header of the second video."""
    header = _video(members, 1).offset - BLOCK
    size = min(4096, path.stat().st_size - header)
    _write(path, header, bytes(size))


def payload_byte(path: Path, members: list[Member]) -> None:
    """One bit inside the first video."""
    video = _video(members, 0)
    _flip(path, video.offset + video.size // 2)


def meta_byte(path: Path, members: list[Member]) -> None:
    """One bit inside the first annotation."""
    meta = next(member for member in members if member.name.endswith(".json"))
    _flip(path, meta.offset + meta.size // 2)


def missing(path: Path, members: list[Member]) -> None:
    path.unlink()


def swapped(path: Path, members: list[Member]) -> None:
    """Two shards with each other's name."""
    other = sorted(path.parent.glob("*.tar"))[-1]
    between = path.with_suffix(".x")
    path.rename(between)
    other.rename(path)
    between.rename(other)


def emptied(path: Path, members: list[Member]) -> None:
    """A file of no bytes, as a full disk leaves it."""
    _cut(path, 0)


def only_zeros(path: Path, members: list[Member]) -> None:
    """A tar without members."""
    path.write_bytes(bytes(20 * BLOCK))


DAMAGES: dict[str, Damage] = {
    function.__name__: function
    for function in (
        cut_inside_a_member, cut_on_a_member_boundary, bad_header, hole_on_a_header, payload_byte, meta_byte, missing,
        swapped, emptied, only_zeros,
    )
}  # fmt: skip


def damage(name: str, path: Path) -> None:
    """Do it to one shard."""
    DAMAGES[name](path, index_tar(path))


def broken_stsz(mp4: bytes) -> bytes:
    """The table of sample sizes claims one frame less is stored in each entry: FFmpeg alone may not notice."""
    place = mp4.index(b"stsz") + 4
    count = struct.unpack_from(">I", mp4, place + 8)[0]
    assert struct.unpack_from(">I", mp4, place + 4)[0] == 0 and count > 1, "sizes are listed one by one"
    return mp4[: place + 8] + struct.pack(">I", 1) + mp4[place + 12 :]
