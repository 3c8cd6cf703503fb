"""Source frames -> stored pictures: upright, cropped, scaled and in 8-bit limited-range yuv420p, in one conversion.

The colour matrix of the source is kept and written into the stored video, because converting it would cost a second
pass through RGB and a rounding; ``decode`` reads it back. High dynamic range keeps its transfer curve: no tone mapping.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
from av.filter import Graph
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from shards.errors import DataError
from shards.schema import Crop

_UNTAGGED, _RGB, _BT709 = 2, 0, 1
_TURNS: dict[int, list[tuple[str, str | None]]] = {
    0: [],
    1: [("transpose", "cclock")],
    2: [("hflip", None), ("vflip", None)],
    3: [("transpose", "clock")],
}


def tag_colours(frame: av.VideoFrame) -> None:
    """Give an untagged high-definition frame the matrix that players assume for its size: BT.709.

    Untagged smaller frames stay BT.601, FFmpeg's default.
    """
    if frame.colorspace == _UNTAGGED and not frame.format.is_rgb and (frame.width >= 1280 or frame.height > 576):
        frame.colorspace = _BT709


def crop_box(crop: Crop, width: int, height: int, aspect: float) -> tuple[int, int, int, int]:
    """``(left, top, width, height)`` in whole pixels of an upright picture; even sizes of at least 2.

    Args:
        crop: the wanted part.
        width, height: of the picture.
        aspect: width of a pixel / its height.

    Raises:
        DataError: the fractions do not describe a part of the picture.
    """
    if not (0 <= crop.left < crop.right <= 1 and 0 <= crop.top < crop.bottom <= 1):
        raise DataError(
            f"crop {crop.left:g}..{crop.right:g} x {crop.top:g}..{crop.bottom:g} is no part of the picture",
            where="crop",
            fix="give fractions of the width and height, 0 <= left < right <= 1 and 0 <= top < bottom <= 1",
        )
    left, right = crop.left * width * aspect, crop.right * width * aspect
    top, bottom = crop.top * height, crop.bottom * height
    if crop.square:
        side = max(right - left, bottom - top)
        left, right = _widen(left, right, side, width * aspect)
        top, bottom = _widen(top, bottom, side, height)
    x, wide = _even(left / aspect, right / aspect, width)
    y, high = _even(top, bottom, height)
    return x, y, wide, high


def _widen(low: float, high: float, side: float, limit: float) -> tuple[float, float]:
    """The interval grown around its centre to ``side``, as far as 0..limit reaches."""
    missing = max(0.0, side - (high - low)) / 2
    return max(0.0, low - missing), min(limit, high + missing)


def _even(low: float, high: float, limit: int) -> tuple[int, int]:
    """First pixel (even, as chroma needs) and even number of pixels of an interval."""
    size = max(2, round((high - low) / 2) * 2)
    first = int(low // 2) * 2
    return max(0, min(first, (limit - size) // 2 * 2)), min(size, max(1, limit))


def stored_size(width: int, height: int, aspect: float, short_side: int) -> tuple[int, int]:
    """Even width and height with square pixels and the wanted short side; never enlarged."""
    wide = width * aspect
    scale = min(1.0, short_side / min(wide, height)) if short_side else 1.0
    return max(2, round(wide * scale / 2) * 2), max(2, round(height * scale / 2) * 2)


class Pictures:
    """Converts the frames of one segment. All results have the size of the first one, also when the source changes.

    Args:
        crop: part of the upright picture to keep; None = all.
        short_side: see ``VideoOptions``.
        aspect: sample aspect ratio of the stored (not yet upright) frames.
        where: media for error messages.
    """

    def __init__(self, crop: Crop | None, short_side: int, aspect: Fraction | float | None, where: str) -> None:
        self.crop, self.short_side, self.aspect, self.where = crop, short_side, float(aspect or 1), where
        self.size: tuple[int, int] | None = None
        self._reformatter = VideoReformatter()
        self._graph: Any = None
        self._graph_for: tuple[Any, ...] = ()
        self._last: tuple[av.VideoFrame, av.VideoFrame] | None = None

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The stored picture of ``frame``; the same object again for a repeated frame."""
        if self._last is not None and self._last[0] is frame:
            return self._last[1]
        try:
            picture = self._convert(frame)
        except av.FFmpegError as error:
            raise DataError(
                f"a {frame.format.name} frame of {frame.width}x{frame.height} pixels cannot be converted ({error})",
                where=self.where,
                fix="convert the file first (ffmpeg -i IN -pix_fmt yuv420p OUT.mp4)",
            ) from error
        self._last = frame, picture
        return picture

    def _convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        tag_colours(frame)
        turns = round(frame.rotation / 90) % 4
        aspect = 1 / self.aspect if turns % 2 else self.aspect
        part = self._upright_part(frame, turns, aspect)
        if self.size is None:
            self.size = stored_size(part.width, part.height, aspect, self.short_side)
        rgb = part.format.is_rgb or part.colorspace == _RGB
        picture = self._reformatter.reformat(
            part,
            width=self.size[0],
            height=self.size[1],
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601 if rgb else None,
            dst_color_range=ColorRange.MPEG,
            interpolation="BICUBIC",
            threads=1,
        )
        picture.pict_type = 0  # otherwise x264 repeats the frame types of the source
        return picture

    def _upright_part(self, frame: av.VideoFrame, turns: int, aspect: float) -> av.VideoFrame:
        """Undo the display rotation that phones store instead of turning the pixels, then crop."""
        if not turns and self.crop is None:
            return frame
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, turns)
        if kind != self._graph_for:
            self._graph, self._graph_for = self._build_graph(frame, turns, aspect), kind
        self._graph.vpush(frame)
        return self._graph.vpull()

    def _build_graph(self, frame: av.VideoFrame, turns: int, aspect: float) -> Graph:
        graph = Graph()
        graph.threads = 1
        source = graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=frame.format.name,
            time_base="1/1000",
            pixel_aspect="1/1",
            colorspace=str(int(frame.colorspace)),
            range=str(int(frame.color_range)),
        )
        nodes = [source, *(graph.add(name, settings) for name, settings in _TURNS[turns])]
        if self.crop is not None:
            width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
            x, y, wide, high = crop_box(self.crop, width, height, aspect)
            nodes.append(graph.add("crop", f"{wide}:{high}:{x}:{y}"))
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        return graph
