"""The square that models see: the usual one, and others placed, scaled and mirrored while frames are scaled."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from shards.media.square import Placement, _cut
from shards.media.video import decode
from tests.unit.shards.making import mp4

SIZE = 32


@pytest.fixture(scope="module")
def stored() -> bytes:
    """Four frames of 80 x 64: smooth colours that tell every place apart."""
    rows, columns = np.mgrid[0:64, 0:80]
    images = [np.stack([40 + 2 * columns, 30 + 3 * rows, 60 + columns + rows + 5 * n], axis=-1) for n in range(4)]
    return mp4(np.stack(images).astype(np.uint8), crf="4")


def square(stored: bytes, **placement: float) -> np.ndarray:
    return decode(stored, 4, None, SIZE, placement=Placement(**placement))  # type: ignore[arg-type]


def test_the_default_is_the_centre_of_the_short_side(stored: bytes) -> None:
    usual = decode(stored, 4, None, SIZE)
    assert usual.shape == (4, SIZE, SIZE, 3) and usual.dtype == np.uint8
    assert (square(stored) == usual).all()
    whole = Image.fromarray(decode(stored, 4)[0]).resize((40, 32), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(whole)[:, 4:36].astype(int) - usual[0]).max() < 12


def test_a_shifted_square_is_the_picture_further_on(stored: bytes) -> None:
    usual, shifted = square(stored), square(stored, right=0.125, down=0.25)
    assert (shifted[:, :24, :28] == usual[:, 8:, 4:]).all()
    assert (shifted[:, 24:] == shifted[:, 23:24]).all(), "below the frame its last row is repeated"


def test_a_zoomed_square_is_the_enlarged_part(stored: bytes) -> None:
    part = square(stored, zoom_x=2.0, zoom_y=2.0, right=0.5, down=-0.5)[1]
    # twice the size: the centre of the square is half a side of it to the right of the frame's centre, and above it
    frame = decode(stored, 4)[1]
    expected = Image.fromarray(frame[0:32, 40:72]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(expected).astype(int) - part)[2:-2, 2:-2].max() < 8


def test_sides_are_stretched_on_their_own(stored: bytes) -> None:
    wide = square(stored, zoom_x=2.0)[0].astype(int)
    usual = square(stored)[0].astype(int)
    assert np.abs(wide[:, 8] - usual[:, 12]).max() < 12 and np.abs(wide[:, 24] - usual[:, 20]).max() < 12


def test_a_square_around_the_frame_repeats_its_edges(stored: bytes) -> None:
    small = square(stored, zoom_x=0.5, zoom_y=0.5)
    assert (small[:, :8] == small[:, 8:9]).all() and (small[:, 24:] == small[:, 23:24]).all()
    assert (small[:, :, :6] == small[:, :, 6:7]).all() and (small[:, :, 26:] == small[:, :, 25:26]).all()


def test_mirrored_swaps_left_and_right_of_what_is_cut(stored: bytes) -> None:
    assert (square(stored, right=0.125, mirrored=True) == square(stored, right=0.125)[:, :, ::-1]).all()


def test_a_cut_equals_a_padded_picture() -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    padded = np.pad(image, ((20, 20), (20, 20), (0, 0)), mode="edge")
    for top, left, size in [(0, 0, 5), (2, 4, 5), (-3, 1, 6), (5, -2, 4), (-4, -4, 20)]:
        expected = padded[20 + top : 20 + top + size, 20 + left : 20 + left + size]
        assert (_cut(image, top, left, size) == expected).all()
