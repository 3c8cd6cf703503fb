"""Media as they arrive from cameras, broadcasts and downloads, written with PyAV. Not a test."""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, VideoReformatter

COLOURS = [(200, 40, 10), (20, 180, 60), (30, 40, 210), (220, 210, 40), (128, 128, 128), (240, 240, 240), (10, 10, 10)]


def patches(frames: int, width: int = 140, height: int = 80) -> np.ndarray:
    """uint8 [T, H, W, 3]: seven coloured columns and a line at the top that grows with the frame number."""
    image = np.zeros((height, width, 3), np.uint8)
    for number, colour in enumerate(COLOURS):
        image[:, width * number // 7 : width * (number + 1) // 7] = colour
    images = np.repeat(image[None], frames, 0)
    for number in range(frames):
        images[number, : height // 8] = 0
        images[number, : height // 8, : width * (number + 1) // (frames + 1)] = 255
    return images


def patch_colours(image: np.ndarray) -> np.ndarray:
    """float [7, 3]: colours in the middle of the columns of :func:`patches`."""
    height, width = image.shape[:2]
    middles = [round(width * (number + 0.5) / 7) for number in range(7)]
    return np.stack([image[height // 2 - 2 : height // 2 + 2, x - 1 : x + 2].mean((0, 1)) for x in middles])


def numbered(frames: int, width: int = 128, height: int = 64) -> np.ndarray:
    """uint8 [T, H, W, 3]: eight fields, four below each other in two columns, are the bits of the frame number."""
    images = np.full((frames, height, width, 3), 90, np.uint8)
    for number in range(frames):
        for bit in range(8):
            top, left = height // 4 * (bit % 4), width // 2 * (bit // 4)
            images[number, top : top + height // 4, left : left + width // 2] = 220 if number >> bit & 1 else 20
    return images


def number_of(image: np.ndarray) -> int:
    """The frame number of a picture of :func:`numbered`."""
    high, wide = image.shape[0] // 4, image.shape[1] // 2
    fields = [image[high * (bit % 4) :, wide * (bit // 4) :][:high, :wide].mean() for bit in range(8)]
    return sum(int(field > 120) << bit for bit, field in enumerate(fields))


def media(
    images: np.ndarray, container: str = "mp4", codec: str = "libx264", pix_fmt: str = "yuv420p", **options: Any
) -> bytes:
    """A video file of uint8 [T, H, W, 3].

    Args:
        options: ``fps``, ``times`` (milliseconds), ``matrix`` (ITU601, ITU709, BT2020), ``full`` range, ``tagged``,
            ``aspect``, ``rotation`` and ``mux`` (options of the container); others go to the encoder.
    """
    fps, times = options.pop("fps", 25), options.pop("times", None)
    matrix, full, tagged = options.pop("matrix", None), options.pop("full", False), options.pop("tagged", True)
    aspect, mux = options.pop("aspect", None), options.pop("mux", {})
    buffer = io.BytesIO()
    settings = {"crf": "12", "x264-params": "threads=1"} if codec == "libx264" else {}
    with av.open(buffer, "w", format=container, options=mux) as output:
        chosen = settings | {key: str(value) for key, value in options.items()}
        stream: Any = output.add_stream(codec, rate=fps, options=chosen)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = pix_fmt
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame in enumerate(_frames(images, pix_fmt, matrix, full)):
            if tagged and matrix is not None and number == 0:
                stream.codec_context.colorspace = frame.colorspace
                stream.codec_context.color_range = 2 if full else 1
            if not tagged:
                frame.colorspace, frame.color_range = 2, 0
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def _frames(images: np.ndarray, pix_fmt: str, matrix: str | None, full: bool) -> Sequence[Any]:
    reformatter = VideoReformatter()
    frames = []
    for image in images:
        frame = av.VideoFrame.from_ndarray(image, "rgb24")
        if matrix is not None:
            wanted = ColorRange.JPEG if full else ColorRange.MPEG
            frame = reformatter.reformat(
                frame, format=pix_fmt, dst_colorspace=matrix, dst_color_range=wanted, threads=1
            )
        frames.append(frame)
    return frames


def remuxed(payload: bytes, container: str = "mp4", **options: str) -> bytes:
    """The same packets in another container or layout (``movflags="faststart"``)."""
    with tempfile.TemporaryDirectory() as folder:  # faststart reads back what it wrote: that needs a file
        path = f"{folder}/file"
        with av.open(io.BytesIO(payload)) as source, av.open(path, "w", format=container, options=options) as target:
            stream: Any = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        return Path(path).read_bytes()


def rotated(payload: bytes, degrees: int) -> bytes:
    """An mp4 whose track header tells players to turn the picture clockwise by 90, 180 or 270 degrees."""
    return displayed(payload, {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees])


def displayed(payload: bytes, axes: tuple[int, int, int, int]) -> bytes:
    """An mp4 whose track header tells players where the two axes go: (1, 0, 0, 1) is the picture as it is stored."""
    a, b, c, d = (value << 16 for value in axes)
    start = payload.index(b"tkhd") + 4 + 40
    return payload[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + payload[start + 36 :]


def broken_stsz(payload: bytes) -> bytes:
    """An mp4 whose table of sample sizes says that the file has one frame."""
    start = payload.index(b"stsz") + 4 + 8
    return payload[:start] + struct.pack(">I", 1) + payload[start + 4 :]


def box_order(payload: bytes) -> list[str]:
    """Names of the top-level boxes of an mp4."""
    names, place = [], 0
    while place < len(payload):
        size = struct.unpack(">I", payload[place : place + 4])[0]
        names.append(payload[place + 4 : place + 8].decode())
        place += size
    return names
