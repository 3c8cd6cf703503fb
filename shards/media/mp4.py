"""The boxes of an MP4 file (ISO/IEC 14496-12, -15): what it holds and whether its structure is whole, without libav.

Reads one kind of file: one H.264 track at a constant rate in one piece, as ``slt shards build`` and most tools write
it. Damage is a DataError. Everything else that is legal but not of this kind raises :class:`NotSure`: the caller asks
libav. Nothing is accepted that was not looked at, so boxes that may change the meaning of others are such a case too.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from shards.errors import DataError
from shards.media.h264 import NotSure, need, picture_size

__all__ = ["Mp4", "NotSure", "check_samples", "read_mp4"]
_HEADER = struct.Struct(">I4s")
_U32, _U64 = struct.Struct(">I"), struct.Struct(">Q")
_ONE = b"\0\1\0\0"  # 16.16
_IDENTITY = _ONE + b"\0" * 12 + _ONE + b"\0" * 12 + b"\x40\0\0\0"
_THIS_FILE = b"\0\0\0\0\0\0\0\1\0\0\0\x0curl \0\0\0\1"
_IN_MOOV = frozenset({b"mvhd", b"trak", b"udta", b"meta", b"iods", b"free", b"skip"})
_IN_TRACK = frozenset({b"tkhd", b"mdia", b"edts", b"udta", b"meta", b"free", b"skip"})
_IN_TABLES = frozenset({b"stsd", b"stts", b"ctts", b"stss", b"stsz", b"stsc", b"stco", b"co64", b"sdtp", b"free"})
_IN_ENTRY = frozenset({b"avcC", b"pasp", b"colr", b"btrt", b"free"})
_VISUAL_ENTRY = 78  # bytes of a sample entry before its boxes
_MOST_BOXES, _LARGEST_MOOV = 64, 64 << 20
_SLICE, _IDR, _OTHER, _UNKNOWN = 0, 1, 2, 3
_UNITS = {1: _SLICE, 5: _IDR, 6: _OTHER, 9: _OTHER, 12: _OTHER}  # the others: SEI, access unit delimiter, filler
_FASTEST = 1000
_FIX = "fetch the file again, or convert it (ffmpeg -i IN OUT.mp4)"

Read = Callable[[int, int], bytes]
"""(offset, size) -> bytes of the file, fewer at its end."""
Wanted = Callable[[int, int, Fraction], bool]
Span = tuple[int, int]
"""First byte of a box's content and the byte after it."""
Boxes = dict[bytes, list[Span]]


@dataclass(frozen=True, slots=True)
class Mp4:
    """One H.264 track: 8-bit 4:2:0, progressive, limited range, square pixels, upright, from time 0 on."""

    width: int
    height: int
    fps: Fraction
    frames: int
    key_frames: np.ndarray
    """int64 [K]: numbers of the frames that decoding can begin with; the first is 0."""
    offsets: np.ndarray
    """int64 [frames]: first byte of each sample in the file. Samples follow each other without gaps."""
    sizes: np.ndarray
    """int64 [frames]"""

    @property
    def longest_gop(self) -> int:
        """Most frames from one key frame to the next or to the end."""
        last = self.frames - int(self.key_frames[-1])
        return max(last, int((self.key_frames[1:] - self.key_frames[:-1]).max(initial=0)))


def read_mp4(read: Read, size: int, where: str, wanted: Wanted | None = None) -> Mp4:
    """Read the boxes of a file of ``size`` bytes; only their headers and ``moov`` are fetched.

    Args:
        wanted: whether to go on with a video of this width, height and frame rate; asked before the tables are
            checked, so that the faults of a file that is not wanted stay unnamed.

    Raises:
        DataError: boxes reach beyond their parents, tables contradict each other, samples lie outside the media data.
        NotSure: not wanted, or of another kind and whole as far as it was looked at.
    """
    top, beyond = _top_level(read, size)
    for kind in (b"moof", b"styp", b"sidx"):
        need(kind not in top, "a fragmented file")
    start, end = _one(top, b"moov")
    need(end <= size, "the movie header is not whole")
    need(end - start <= _LARGEST_MOOV, "a movie header of more than 64 MiB")
    kind_start, kind_end = _one(top, b"ftyp")
    need(kind_end - kind_start >= 8 and read(kind_start, 4) != b"qt  ", "a QuickTime file")
    track = _Track(read(start, end - start), where)
    found = track.read(wanted, size)
    if beyond:
        raise _damaged(beyond, where)
    _check_place(found, top.get(b"mdat", []), where)
    return found


def _damaged(what: str, where: str) -> DataError:
    return DataError(f"damaged or truncated mp4: {what}", where=where, fix=_FIX)


def _top_level(read: Read, size: int) -> tuple[Boxes, str]:
    """The boxes of the file, and what is wrong with the last one."""
    found: Boxes = {}
    place = 0
    for _ in range(_MOST_BOXES):
        if place == size:
            return found, ""
        header = read(place, 16)
        need(len(header) >= 8, "bytes after the last box")
        length, kind = _HEADER.unpack_from(header)
        begin = 8
        if length == 1 and len(header) == 16:
            length, begin = int(_U64.unpack_from(header, 8)[0]), 16
        elif length == 0:
            length = size - place
        need(length >= begin, "a box smaller than its header")
        found.setdefault(kind, []).append((place + begin, place + length))
        place += length
        if place > size:
            return found, f"the {kind.decode('latin-1')} box ends at byte {place}, the file at {size}"
    raise NotSure(f"more than {_MOST_BOXES} boxes")


def _one(boxes: Boxes, kind: bytes) -> Span:
    found = boxes.get(kind, [])
    need(len(found) == 1, f"not one {kind.decode()} box")
    return found[0]


class _Track:
    """The only track of a ``moov`` box."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where = data, where

    def read(self, wanted: Wanted | None, room: int) -> Mp4:
        """What the track says; the samples' places are those of its tables."""
        movie = self._boxes((0, len(self.data)), _IN_MOOV)
        track = self._boxes(_one(movie, b"trak"), _IN_TRACK)
        media = self._boxes(_one(track, b"mdia"))
        information = self._boxes(_one(media, b"minf"))
        handler, _ = self._content(_one(media, b"hdlr"), 12)
        need(self.data[handler + 8 : handler + 12] == b"vide", "no video track")
        references, end = _one(self._boxes(_one(information, b"dinf")), b"dref")
        need(self.data[references:end] == _THIS_FILE, "media in another file")
        tables = self._boxes(_one(information, b"stbl"), _IN_TABLES)
        width, height = self._description(_one(tables, b"stsd"))
        self._upright(movie, track, width, height)
        timescale = self._timescale(_one(media, b"mdhd"), 12)
        durations = self._table(_one(tables, b"stts"), 2)
        need(timescale > 0 and len(durations) > 0 and durations[0, 1] > 0, "no frame rate")
        duration = int(durations[0, 1])
        fps = Fraction(timescale, duration)
        need(1 <= fps <= _FASTEST, "an unusual frame rate")
        need(wanted is None or wanted(width, height, fps), "another size or rate than wanted")
        sizes = self._sizes(_one(tables, b"stsz"), room)
        self._constant(_one(tables, b"stts"), len(sizes), "frame durations")
        late = self._constant(_one(tables, b"ctts"), len(sizes), "time offsets") if b"ctts" in tables else 0
        scales = timescale, self._timescale(_one(movie, b"mvhd"), 12)
        self._begins_at_zero(track, late, (len(sizes) - 1) * duration, scales)
        keys, offsets = self._key_frames(tables, len(sizes)), self._offsets(tables, sizes)
        return Mp4(width, height, fps, len(sizes), keys, offsets, sizes)

    def _boxes(self, span: Span, known: frozenset[bytes] | None = None) -> Boxes:
        """The boxes inside one; with ``known``, others are a reason to be not sure."""
        found: Boxes = {}
        place, end = span
        while end - place >= 8:
            length, kind = _HEADER.unpack_from(self.data, place)
            begin = 8
            if length == 1 and end - place >= 16:
                length, begin = int(_U64.unpack_from(self.data, place + 8)[0]), 16
            if length < begin or place + length > end:
                name = kind.decode("latin-1")
                raise _damaged(f"the {name!r} box of {length} bytes does not fit into its parent", self.where)
            need(known is None or kind in known, "a box of unknown meaning")
            found.setdefault(kind, []).append((place + begin, place + length))
            place += length
        need(not any(self.data[place:end]), "bytes after the last box")  # QuickTime ends lists with zeros
        return found

    def _content(self, span: Span, least: int) -> Span:
        """A box that must hold so many bytes."""
        if span[1] - span[0] < least:
            raise _damaged(f"a box has {span[1] - span[0]} of {least} bytes", self.where)
        return span

    def _wide(self, start: int) -> bool:
        """Whether a box has the version with 64-bit times."""
        need(self.data[start] <= 1, "a box of unknown version")
        return self.data[start] == 1

    def _timescale(self, span: Span, place: int) -> int:
        """Of a movie or media header."""
        start, _ = self._content(span, 24)
        return int(_U32.unpack_from(self.data, start + (20 if self._wide(start) else place))[0])

    def _upright(self, movie: Boxes, track: Boxes, width: int, height: int) -> None:
        """No turn, no stretch."""
        for name, boxes, place in ((b"mvhd", movie, 36), (b"tkhd", track, 40)):
            start, end = self._content(_one(boxes, name), 4)
            start += place + (12 if self._wide(start) else 0)
            self._content((start, end), 36 + 8)
            need(self.data[start : start + 36] == _IDENTITY, "a turned or stretched picture")
        shown = struct.unpack_from(">2I", self.data, start + 36)
        need(shown == (width << 16, height << 16), "a picture shown in another size")

    def _description(self, span: Span) -> tuple[int, int]:
        """Width and height from the one sample entry."""
        start, end = self._content(span, 8)
        need(self.data[start : start + 8] == b"\0\0\0\0\0\0\0\1", "several sample descriptions")
        start, end = _one(self._boxes((start + 8, end)), b"avc1")
        self._content((start, end), _VISUAL_ENTRY)
        need(self.data[start + 6 : start + 8] == b"\0\1", "media in another file")
        size = struct.unpack_from(">2H", self.data, start + 24)
        inside = self._boxes((start + _VISUAL_ENTRY, end), _IN_ENTRY)
        if b"pasp" in inside:
            aspect, _ = self._content(_one(inside, b"pasp"), 8)
            need(self.data[aspect : aspect + 4] == self.data[aspect + 4 : aspect + 8], "pixels that are not square")
        if b"colr" in inside:
            colours, _ = self._content(_one(inside, b"colr"), 10)
            kind = self.data[colours : colours + 4]
            need(
                kind == b"nclc" or (kind == b"nclx" and self.data[colours + 10 : colours + 11] < b"\x80"),
                "full range or a profile",
            )
        begin, end = _one(inside, b"avcC")
        need(size == picture_size(self.data[begin:end]), "sizes of the entry and of the pictures differ")
        return size

    def _table(self, span: Span, columns: int, before: int = 4) -> np.ndarray:
        """uint32 [rows, columns] of a table box: ``before`` bytes, the number of rows, the rows."""
        start, end = self._content(span, before + 4)
        [rows] = _U32.unpack_from(self.data, start + before)
        if before + 4 + rows * columns * 4 > end - start:
            raise _damaged(f"a table of {rows} rows in a box of {end - start} bytes", self.where)
        return np.frombuffer(self.data, ">u4", rows * columns, start + before + 4).reshape(rows, columns)

    def _sizes(self, span: Span, room: int) -> np.ndarray:
        """int64 [frames]; ``room``: bytes of the file."""
        start, _ = self._content(span, 12)
        size, frames = struct.unpack_from(">2I", self.data, start + 4)
        need(frames > 0, "no frames")
        if size * frames > room:
            raise _damaged(f"{frames} frames of {size} bytes in a file of {room}", self.where)
        if size:
            return np.full(frames, size, np.int64)
        sizes = self._table(span, 1, before=8)[:, 0].astype(np.int64)
        if not sizes.all():
            raise _damaged(f"frame {int(np.argmin(sizes))} has no bytes", self.where)
        return sizes

    def _constant(self, span: Span, frames: int, name: str) -> int:
        """The one value of a run-length table that covers all frames."""
        rows: list[list[int]] = self._table(span, 2).tolist()
        if (count := sum(row[0] for row in rows)) != frames:
            raise _damaged(f"{name} of {count} frames, sizes of {frames}", self.where)
        need(all(row[1] == rows[0][1] for row in rows), f"{name} differ")
        return rows[0][1]

    def _begins_at_zero(self, track: Boxes, late: int, last: int, scales: tuple[int, int]) -> None:
        """The edit list, if any, begins at the first frame and reaches the last one."""
        begins = 0
        if b"edts" in track:
            start, end = self._content(_one(self._boxes(_one(track, b"edts")), b"elst"), 20)
            form = ">QqI" if self._wide(start) else ">IiI"
            need(self.data[start + 4 : start + 8] == b"\0\0\0\1", "several edits")
            self._content((start, end), 8 + struct.calcsize(form))
            length, begins, rate = struct.unpack_from(form, self.data, start + 8)
            need(rate == 1 << 16 and length * scales[0] > last * scales[1], "an edit that leaves frames out")
        need(begins == late, "does not begin at 0")

    def _key_frames(self, tables: Boxes, frames: int) -> np.ndarray:
        if b"stss" not in tables:
            return np.arange(frames)  # every frame is one
        span = _one(tables, b"stss")
        keys = self._table(span, 1)[:, 0].astype(np.int64) - 1
        if len(keys) and ((keys[1:] <= keys[:-1]).any() or keys[-1] >= frames or keys[0] < 0):
            raise _damaged("the list of key frames is not increasing or leaves the video", self.where)
        need(len(keys) > 0 and keys[0] == 0, "does not begin with a key frame")
        return keys

    def _offsets(self, tables: Boxes, sizes: np.ndarray) -> np.ndarray:
        """Where each sample lies, from the chunks."""
        need((b"stco" in tables) != (b"co64" in tables), "not one table of chunks")
        if b"stco" in tables:
            chunks = self._table(_one(tables, b"stco"), 1)[:, 0].astype(np.int64)
        else:
            wide = self._table(_one(tables, b"co64"), 2).astype(np.int64)
            need(not (wide[:, 0] >> 31).any(), "a chunk beyond 2^63")
            chunks = wide[:, 0] << 32 | wide[:, 1]
        per_chunk = self._per_chunk(_one(tables, b"stsc"), len(chunks))
        if (count := sum(per_chunk)) != len(sizes):
            raise _damaged(f"chunks of {count} frames, sizes of {len(sizes)}", self.where)
        before = np.cumsum(sizes) - sizes
        if len(chunks) == 1:
            return before + chunks[0]
        firsts = np.cumsum(per_chunk) - per_chunk
        return np.repeat(chunks - before[firsts], per_chunk) + before

    def _per_chunk(self, span: Span, chunks: int) -> list[int]:
        """Frames of each chunk, from runs (first chunk, frames per chunk, sample description)."""
        found: list[int] = []
        runs: list[list[int]] = self._table(span, 3).tolist()
        need(len(runs) > 0 and chunks > 0, "no chunks")
        for (first, frames, description), following in zip(runs, [*runs[1:], [chunks + 1]], strict=True):
            need(description == 1, "several sample descriptions")
            if first != len(found) + 1 or not first < following[0] <= chunks + 1 or not frames:
                raise _damaged("the runs of chunks are not increasing or leave the list of chunks", self.where)
            found += [frames] * (following[0] - first)
        return found


def _check_place(track: Mp4, media: list[Span], where: str) -> None:
    """All samples lie inside one ``mdat`` box, one after the other."""
    ends = track.offsets + track.sizes
    gaps = track.offsets[1:] - ends[:-1]
    if (gaps < 0).any():
        order = np.argsort(track.offsets, kind="stable")
        if (track.offsets[order][1:] < ends[order][:-1]).any():
            raise _damaged("samples overlap", where)
    need(not gaps.any(), "samples with gaps between them")
    first, last = int(track.offsets[0]), int(ends[-1])
    if not any(start <= first and last <= end for start, end in media):
        raise _damaged(f"samples at bytes {first}..{last} lie outside the media data", where)


def check_samples(track: Mp4, payload: bytes, where: str) -> None:
    """Walk the units (NAL) of every sample: their lengths add up, their kinds fit, no stretch is zeros.

    H.264 never holds three zero bytes in a row inside a unit, so eight are a hole in the file.

    Raises:
        DataError: naming the first damaged frame.
        NotSure: units that change the meaning of others, e.g. parameter sets among the pictures.
    """
    first, last = int(track.offsets[0]), int(track.offsets[-1] + track.sizes[-1])
    if last > len(payload):
        raise _damaged(f"{len(payload)} of {last} bytes", where)
    words = np.frombuffer(payload, np.uint64, (last - first) // 8, first)
    if not words.min(initial=1):
        frame = int(np.searchsorted(track.offsets, first + 8 * int(np.argmin(words != 0)), "right")) - 1
        raise _damaged(f"zeros in frame {frame}", where)
    lengths_at = np.ndarray((last - 3,), ">u4", payload, strides=(1,))  # a number at every byte
    units = np.frombuffer(payload, np.uint8)
    frames, place, ends = np.arange(track.frames), track.offsets, track.offsets + track.sizes
    meanings = _kinds()
    pictures = np.full(track.frames, _OTHER, np.uint8)  # the kind of slice seen in each frame
    while len(frames):
        if (short := ends - place < 5).any():
            raise _damaged(_uneven(frames, short), where)
        lengths = lengths_at[place]
        after = place + 4 + lengths
        if (bad := (after > ends) | (lengths == 0)).any():
            raise _damaged(_uneven(frames, bad), where)
        kinds = meanings[units[place + 4]]
        need(bool(kinds.max() <= _OTHER), "parameter sets or unknown units among the pictures")
        seen = pictures[frames]
        need(bool(((kinds == seen) | (kinds == _OTHER) | (seen == _OTHER)).all()), "slices of two kinds in one frame")
        pictures[frames] = np.minimum(seen, kinds)
        rest = (after < ends).nonzero()[0]
        frames, place, ends = frames[rest], after[rest], ends[rest]
    expected = np.full(track.frames, _SLICE, np.uint8)
    expected[track.key_frames] = _IDR
    need(bool((pictures == expected).all()), "pictures do not agree with the list of key frames")


@functools.cache
def _kinds() -> np.ndarray:
    """uint8 [256]: what the first byte of a unit says."""
    meanings = [_UNITS.get(head & 31, _UNKNOWN) if head < 128 else _UNKNOWN for head in range(256)]
    return np.array(meanings, np.uint8)


def _uneven(frames: np.ndarray, bad: np.ndarray) -> str:
    return f"the units of frame {int(frames[np.argmax(bad)])} do not add up to its size"
