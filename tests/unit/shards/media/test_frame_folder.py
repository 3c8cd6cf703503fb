"""Images of every mode as frames: upright, with their own brightness, and nothing that is no frame among them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.build.prepare import Skip, prepare_video
from shards.errors import DataError
from shards.media.frame_folder import folder_frames, frame_files
from shards.media.video import VideoOptions
from shards.schema import FrameFolder, Segment, VideoFile
from tests.unit.shards.media_files import number_of, numbered


def frames(folder: Path) -> list[np.ndarray]:
    found = list(folder_frames(FrameFolder(folder, "*", 25.0)))
    assert found[-1] == (len(found[:-1]) / 25, None)
    return [frame.to_ndarray() for _, frame in found[:-1] if frame is not None]


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    for number, image in enumerate(numbered(3)):
        Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(tmp_path / f"{number}.png")
    found = frames(tmp_path)
    assert [number_of(image) for image in found] == [0, 1, 2]
    assert np.array_equal(found[2], numbered(3)[2])


def test_pictures_are_turned_as_their_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    lying = np.ascontiguousarray(np.rot90(numbered(6)[5]))
    Image.fromarray(lying).save(tmp_path / "0.jpg", exif=exif, quality=95)
    [found] = frames(tmp_path)
    assert found.shape == (64, 128, 3) and number_of(found) == 5


def test_leftovers_of_file_managers_are_no_frames(tmp_path: Path) -> None:
    for number, image in enumerate(numbered(2)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "._0.png").write_bytes(b"Mac OS X")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    assert [path.name for path in frame_files(FrameFolder(tmp_path, "*", 25.0))] == ["0.png", "1.png"]


def test_pixels_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "0.tiff")
    with pytest.raises(DataError, match=r"0\.tiff: pixels of mode 'F', whose range is not known\n  fix: convert"):
        frames(tmp_path)


def test_what_is_no_media_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    expected = {
        "gone": "gone does not exist",
        "folder": "folder is a folder, not a video",
        "link": "link is a link that leads nowhere",
        "pipe": "pipe is no regular file",
    }
    media = {name: VideoFile(tmp_path / name) for name in expected}
    skips = [prepare_video(Segment("c", name, "train", "text", media[name]), VideoOptions()) for name in expected]
    folder = Segment("c", "images", "train", "text", FrameFolder(tmp_path / "folder", "*.png", 25.0))
    skips.append(prepare_video(folder, VideoOptions()))
    details = [skip.detail for skip in skips if isinstance(skip, Skip) and skip.reason == "missing_media"]
    wanted = [*expected.values(), "folder holds no image that matches *.png"]
    assert all(detail.endswith(what) for detail, what in zip(details, wanted, strict=True)), details
