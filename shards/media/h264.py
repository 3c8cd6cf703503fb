"""Parameter sets of H.264 (ITU-T H.264, 7.3.2) as far as the stored form is decided by them."""

from __future__ import annotations

import functools

_HIGH_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})
_SPS, _PPS = 7, 8
_SQUARE, _OWN_ASPECT = (0, 1), 255  # aspect_ratio_idc: unspecified or 1:1


class NotSure(Exception):
    """Legal, as far as was looked at, but of a kind that is not read here: ask libav."""


def need(fact: bool, otherwise: str) -> None:
    """Go on only if ``fact`` holds. Raises NotSure(otherwise)."""
    if not fact:
        raise NotSure(otherwise)


class _Bits:
    """Fields of a parameter set, first bit first. Reading past the end is a NotSure."""

    def __init__(self, unit: bytes) -> None:
        raw = unit.replace(b"\0\0\3", b"\0\0")  # bytes that keep start codes out of the data
        self._value, self._left = int.from_bytes(raw), 8 * len(raw)

    def bits(self, count: int) -> int:
        need(self._left >= count, "a parameter set that ends early")
        self._left -= count
        return self._value >> self._left & ((1 << count) - 1)

    def number(self) -> int:
        """ue(v): an Exp-Golomb number."""
        zeros = 0
        while not self.bits(1):
            zeros += 1
            need(zeros <= 32, "a parameter set with a number beyond 32 bits")
        return (1 << zeros) - 1 + self.bits(zeros)

    def ended(self) -> bool:
        """Whether only the closing bit and zeros are left."""
        return self._left > 0 and self._value & ((1 << self._left) - 1) == 1 << (self._left - 1)


@functools.lru_cache(maxsize=256)
def picture_size(configuration: bytes) -> tuple[int, int]:
    """Width and height from the content of an ``avcC`` box (ISO/IEC 14496-15) with one set of each kind.

    Raises:
        NotSure: not 8-bit 4:2:0, interlaced, full range, pixels that are not square, sets that do not fit together.
    """
    need(len(configuration) > 8 and configuration[0] == 1, "an unknown decoder configuration")
    need(configuration[4] & 3 == 3, "unit lengths of other than 4 bytes")
    need(configuration[5] & 31 == 1, "not one sequence parameter set")
    end = 8 + int.from_bytes(configuration[6:8])
    sps = configuration[8:end]
    need(configuration[end : end + 1] == b"\1", "not one picture parameter set")
    pps_end = end + 3 + int.from_bytes(configuration[end + 1 : end + 3])
    pps = configuration[end + 3 : pps_end]
    need(len(sps) > 4 and len(pps) > 1 and pps_end <= len(configuration), "parameter sets that are not whole")
    need((sps[0] & 159, pps[0] & 159) == (_SPS, _PPS), "parameter sets of another kind")
    identity, size = _sequence(sps)
    picture = _Bits(pps[1:])
    picture.number()
    need(picture.number() == identity, "a picture parameter set without its sequence")
    _picture(picture)
    return size


def _picture(reader: _Bits) -> None:
    """The rest of a picture parameter set is as long as its fields say."""
    reader.bits(2)
    need(reader.number() == 0, "slice groups")
    need(max(reader.number(), reader.number()) < 32, "more than 32 reference frames")
    need(reader.bits(3) & 3 != 3, "an unknown weighting")
    need(reader.number() <= 52 and reader.number() <= 52 and reader.number() <= 24, "an impossible quantiser")
    reader.bits(3)
    if not reader.ended():
        reader.bits(1)
        need(reader.bits(1) == 0 and reader.number() <= 24, "scaling matrices")
    need(reader.ended(), "a picture parameter set of another length")


def _sequence(sps: bytes) -> tuple[int, tuple[int, int]]:
    """Number of a sequence parameter set, and (width, height)."""
    reader = _Bits(sps[4:])
    identity = reader.number()
    if sps[1] in _HIGH_PROFILES:
        need((reader.number(), reader.number(), reader.number()) == (1, 0, 0), "not 8-bit 4:2:0")
        need(reader.bits(2) == 0, "scaling matrices or a lossless mode")
    need(reader.number() <= 12, "an impossible number of frames")
    order = reader.number()
    need(order == 2 or (order == 0 and reader.number() <= 12), "an unusual order of pictures")
    need(reader.number() <= 16, "more than 16 reference frames")
    reader.bits(1)
    width, height = 16 * (reader.number() + 1), 16 * (reader.number() + 1)
    need(reader.bits(1) == 1, "interlaced")
    reader.bits(1)
    if reader.bits(1):
        left, right, top, bottom = (2 * reader.number() for _ in range(4))
        need(left == top == 0, "a picture cut at the left or top")
        width, height = width - right, height - bottom
    if reader.bits(1):
        _usability(reader)
    return identity, (width, height)


def _usability(reader: _Bits) -> None:
    """The part of the video usability information that the stored form depends on."""
    if reader.bits(1):
        aspect = reader.bits(8)
        need(aspect in _SQUARE or (aspect == _OWN_ASPECT and reader.bits(16) == reader.bits(16)), "not square pixels")
    if reader.bits(1):
        reader.bits(1)
    if reader.bits(1):
        reader.bits(3)
        need(reader.bits(1) == 0, "full range")
