"""Any bytes: indexing a mutated tar either names the damage or loses nothing that is undamaged. Never a hang.

Tars of three kinds are mutated: ours, one with GNU long names, one with pax headers.
"""

from __future__ import annotations

import contextlib
import io
import signal
import tarfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import DataError
from shards.format.tar import BLOCK, Member, index_tar
from shards.format.writer import TarWriter

MEMBERS = 9
EXAMPLES = 150


@dataclass(frozen=True)
class Mutation:
    """``remove`` bytes at ``at`` (a fraction of the file) are replaced by ``insert``."""

    at: float
    remove: int
    insert: bytes

    def apply(self, blob: bytes) -> bytes:
        place = int(self.at * len(blob))
        return blob[:place] + self.insert + blob[place + self.remove :]


def flip(at: float, bits: int) -> Mutation:
    return Mutation(at, 1, bytes([bits]))


SIZES = st.integers(0, 3 * BLOCK) | st.sampled_from([BLOCK, 2 * BLOCK, 8 * BLOCK, 20 * BLOCK])
PLACES = st.floats(0, 1, exclude_max=True)
MUTATIONS = st.one_of(
    st.builds(flip, PLACES, st.integers(0, 255)),
    st.builds(lambda at, size: Mutation(at, size, b""), PLACES, SIZES),
    st.builds(lambda at, size: Mutation(at, size, bytes(size)), PLACES, SIZES),
    st.builds(lambda at, size, byte: Mutation(at, 0, bytes([byte]) * size), PLACES, SIZES, st.integers(0, 255)),
    st.builds(lambda at: Mutation(at, 1 << 30, b""), PLACES),
    st.builds(lambda at, size, data: Mutation(at, size, data), PLACES, SIZES, st.binary(max_size=64)),
)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Tars by kind of header; payloads of 0, 1, 511, 512, 513 ... bytes without a byte 0."""
    folder = tmp_path_factory.mktemp("fuzz")
    random = np.random.default_rng(0)
    sizes = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 700, 1500, 2 * BLOCK, 90]
    payloads = [random.integers(1, 256, size, dtype=np.uint8).tobytes() for size in sizes]
    with TarWriter(folder / "ours.tar") as tar:
        for number, payload in enumerate(payloads):
            tar.add(f"clip{number}.mp4", payload)
    kinds = {"gnu": (tarfile.GNU_FORMAT, "x" * 120), "pax": (tarfile.PAX_FORMAT, "ü" * 110)}
    for name, (form, long) in kinds.items():
        with tarfile.open(folder / f"{name}.tar", "w", format=form) as archive:
            for number, payload in enumerate(payloads):
                info = tarfile.TarInfo(f"{long if number % 2 else 'short'}{number}.mp4")
                info.size = len(payload)
                archive.addfile(info, io.BytesIO(payload))
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


class StillRunning(BaseException):
    """Not an Exception: code under test that handles those must not swallow it."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail instead of hanging."""

    def stop(*_: object) -> None:
        raise StillRunning(f"after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def survivors(blob: bytes, mutated: bytes, members: list[Member]) -> list[tuple[str, int, int]]:
    """(name, size, crc32) of the members that lie, headers included, wholly before the first or after the last change.

    After a change of length only those before it count: a tar has no way to find a header that moved.
    """
    shorter = min(len(blob), len(mutated))
    one, two = np.frombuffer(blob, np.uint8)[:shorter], np.frombuffer(mutated, np.uint8)[:shorter]
    changed = np.flatnonzero(one != two)
    first = int(changed[0]) if len(changed) else shorter
    last = int(changed[-1]) if len(blob) == len(mutated) and len(changed) else len(blob)
    starts = [0, *(member.offset + -(-member.size // BLOCK) * BLOCK for member in members)]
    return [
        (member.name, member.size, member.crc32)
        for member, start, end in zip(members, starts, starts[1:], strict=False)
        if end <= first or start > last
    ]


@pytest.mark.parametrize("kind", ["ours", "gnu", "pax"])
def test_a_mutated_tar_is_refused_or_nothing_undamaged_is_lost(
    tars: dict[str, bytes], kind: str, tmp_path: Path
) -> None:
    blob, path = tars[kind], tmp_path / "x.tar"
    path.write_bytes(blob)
    members = index_tar(path)
    assert len(members) == MEMBERS

    @settings(max_examples=EXAMPLES)
    @given(st.lists(MUTATIONS, min_size=1, max_size=3))
    def check(mutations: list[Mutation]) -> None:
        mutated = blob
        for mutation in mutations:
            mutated = mutation.apply(mutated) if mutated else mutated
        path.write_bytes(mutated)
        with at_most(5):
            try:
                found = index_tar(path)
            except DataError as error:
                assert str(path) in error.where and error.fix
                return
        names = [(member.name, member.size, member.crc32) for member in found]
        lost = [member for member in survivors(blob, mutated, members) if member not in names]
        assert not lost, "undamaged members vanished without a word"

    check()


@pytest.mark.parametrize("kind", ["ours", "gnu", "pax"])
def test_every_cut_is_noticed(tars: dict[str, bytes], kind: str, tmp_path: Path) -> None:
    """All places where a copy may have stopped: before the two closing blocks every one is an error."""
    blob, path = tars[kind], tmp_path / "x.tar"
    path.write_bytes(blob)
    last = index_tar(path)[-1]
    closed = last.offset + -(-last.size // BLOCK) * BLOCK + 2 * BLOCK
    for cut in (*range(0, closed, 101), *range(0, closed, BLOCK), closed - 1):
        path.write_bytes(blob[:cut])
        with pytest.raises(DataError, match=r"truncated: "):
            index_tar(path)
    path.write_bytes(blob[:closed])
    assert len(index_tar(path)) == MEMBERS


def test_every_flipped_bit_of_a_header_is_noticed_or_changes_nothing(tars: dict[str, bytes], tmp_path: Path) -> None:
    """All bytes of one header. Some of the checksum field say nothing: leading zero or space, closing characters."""
    blob, path = tars["ours"], tmp_path / "x.tar"
    path.write_bytes(blob)
    members = index_tar(path)
    header, silent = members[3].offset - BLOCK, []
    for place in range(BLOCK):
        mutated = bytearray(blob)
        mutated[header + place] ^= 1 << (place % 8)
        path.write_bytes(mutated)
        try:
            assert index_tar(path) == members
            silent.append(place)
        except DataError as error:
            assert "bad_header: " in error.what and error.where == f"{path}@{header}"
    assert set(silent) <= set(range(148, 156))


def test_noise_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "noise.tar"

    @settings(max_examples=EXAMPLES)
    @given(st.binary(max_size=4 * BLOCK))
    def check(noise: bytes) -> None:
        path.write_bytes(noise)
        try:
            with at_most(5):
                assert index_tar(path) == [] and not any(noise) and len(noise) >= 2 * BLOCK
        except DataError as error:
            assert str(path) in error.where

    check()


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A header with a right checksum, whatever stands in its size field."""
    info = tarfile.TarInfo(name)
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157] = size.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_a_size_beyond_the_file_takes_no_memory(tmp_path: Path) -> None:
    """A header may claim 8 GiB, or 2**88 bytes in base 256; neither is reserved or read."""
    path = tmp_path / "x.tar"
    claims = [b"77777777777", b"\x80" + b"\xff" * 11]
    for claim in claims:
        for kind in (b"0", b"x", b"L"):
            path.write_bytes(header("big.mp4", claim, kind) + bytes(4 * BLOCK))
            tracemalloc.start()
            with at_most(5), pytest.raises(DataError, match="is cut off, the file ends at byte 2560"):
                index_tar(path)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 8 << 20


def test_memory_stays_below_the_file_and_a_buffer(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with TarWriter(path) as tar:
        for number in range(8):
            tar.add(f"{number}.mp4", bytes([number + 1]) * (4 << 20))
    tracemalloc.start()
    assert len(index_tar(path)) == 8
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20, "payloads are read in pieces"


@pytest.mark.parametrize("kind", [b"0", b"5"])
@pytest.mark.parametrize("size", [b"-0000001000", b"-0000000001"])
def test_a_negative_size_is_refused(tmp_path: Path, size: bytes, kind: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(header("a.mp4", size, kind) + bytes(8 * BLOCK))
    with at_most(1), pytest.raises(DataError, match="unreadable member size"):
        index_tar(path)


PAX_RECORDS = [
    b"0 path=x\n",
    b"\xb2 path=x\n",
    pytest.param(b"9" * 5000 + b" path=x\n", id="more digits than int() takes"),
    pytest.param(b"99 path=x\n", id="longer than its member"),
    pytest.param(b"3 =" * 200_000, id="no line end, and quadratic time"),
]


@pytest.mark.parametrize("record", PAX_RECORDS)
def test_unreadable_pax_records_are_refused(tmp_path: Path, record: bytes) -> None:
    path = tmp_path / "x.tar"
    padded = record + bytes(-len(record) % BLOCK)
    path.write_bytes(header("p", b"%011o" % len(record), b"x") + padded + header("a", b"0") + bytes(2 * BLOCK))
    with at_most(1), pytest.raises(DataError, match="unreadable pax record"):
        index_tar(path)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is asked once, at the beginning; a copy that is cut short afterwards must not hang the index."""
    path = tmp_path / "x.tar"
    with TarWriter(path) as tar:
        tar.add("a.mp4", b"a" * (3 << 20))
    real = path.stat().st_size
    with path.open("r+b") as handle:
        handle.truncate(2 << 20)

    class Stat:
        st_size = real

    monkeypatch.setattr("shards.format.tar.os.fstat", lambda _: Stat)
    with at_most(1), pytest.raises(DataError, match="truncated: "):
        index_tar(path)
