"""The CRC-32 of concatenated byte strings from the CRC-32 of each, so that one pass checks many of them.

CRC(A + B) is CRC(A) x^(8 |B|) + CRC(B) over GF(2), modulo the polynomial of CRC-32, as in ``crc32_combine`` of zlib.
Multiplying by a fixed power is linear in the other factor, so four tables of 256 entries reduce it to four look-ups,
for all strings at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.storage.spans import Ints

_POLYNOMIAL = 0xEDB88320  # bits reflected, as zlib keeps them: bit 31 is x^0
_ONE = 1 << 31
UNIT = 2
"""Bytes in which lengths are counted."""
_NEAR = 64  # powers in the first table; the second holds every 64th


class Joiner:
    """Joins CRC-32s; keeps the tables of powers, which grow with the longest distance needed."""

    def __init__(self) -> None:
        unit = _ONE
        for _ in range(8 * UNIT):
            unit = _times_x(unit)
        self._near = _tables(_powers(unit, _NEAR))
        self._step = _product(_powers(unit, _NEAR)[-1], unit)
        self._far = _tables([_ONE])

    def runs(self, crcs: Ints, sizes: Ints, starts: Ints) -> Ints:
        """The CRC-32 of every run of neighbours.

        Args:
            crcs: CRC-32 of every byte string.
            sizes: bytes of each, multiples of UNIT.
            starts: number of the first string of every run, ascending from 0.
        """
        if len(starts) == len(crcs):
            return crcs
        ends = np.cumsum(sizes)
        run_ends = ends[np.append(starts[1:], len(ends)) - 1]
        distance = (np.repeat(run_ends, np.diff(starts, append=len(ends))) - ends) // UNIT
        far, near = distance // _NEAR, distance % _NEAR
        if (most := int(far.max()) + 1) > len(self._far) // 1024:
            self._far = _tables(_powers(self._step, max(most, len(self._far) // 512)))
        moved = _moved(self._far, far, _moved(self._near, near, crcs))
        return np.bitwise_xor.reduceat(moved, starts)


def _moved(tables: Ints, power: Ints, crcs: Ints) -> Ints:
    """Every CRC-32 times its power."""
    base = power << 10
    product = tables[base + (crcs & 255)]
    for byte in (1, 2, 3):
        product ^= tables[base + (256 * byte) + (crcs >> (8 * byte) & 255)]
    return product


def _times_x(value: int) -> int:
    return value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)


def _product(left: int, right: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if left >> bit & 1:
            product ^= right
        right = _times_x(right)
    return product


def _powers(base: int, count: int) -> list[int]:
    """The powers 0 .. count - 1."""
    powers = [_ONE]
    while len(powers) < count:
        powers.append(_product(base, powers[-1]))
    return powers


def _tables(factors: list[int]) -> Ints:
    """[factor x byte of the other factor x its 256 values], flat."""
    times: NDArray[np.int64] = np.asarray(factors, dtype=np.int64)
    tables = np.zeros((len(factors), 4, 256), dtype=np.int64)
    for bit in range(31, -1, -1):  # the other factor has this bit alone
        byte, value = bit // 8, 1 << bit % 8
        tables[:, byte, value] = times
        times = times >> 1 ^ np.where(times & 1, _POLYNOMIAL, 0)
    for value in (2, 4, 8, 16, 32, 64, 128):
        for rest in range(1, value):
            tables[:, :, value + rest] = tables[:, :, value] ^ tables[:, :, rest]
    return tables.reshape(-1)
