"""Source frames -> stored pictures: upright, cropped, scaled and in 8-bit limited-range yuv420p, in one conversion.

The colour matrix of the source is kept and written into the stored video, because converting it would cost a second
pass through RGB and a rounding; ``decode`` reads it back. High dynamic range keeps its transfer curve: no tone mapping.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from shards.errors import DataError
from shards.schema import Crop

_UNTAGGED, _RGB, _BT709 = 2, 0, 1
_Filters = list[tuple[str, str | None]]
_UPRIGHT: dict[tuple[int, int, int, int], _Filters] = {
    (1, 0, 0, 1): [],
    (-1, 0, 0, 1): [("hflip", None)],
    (1, 0, 0, -1): [("vflip", None)],
    (-1, 0, 0, -1): [("hflip", None), ("vflip", None)],
    (0, 1, -1, 0): [("transpose", "clock")],
    (0, -1, 1, 0): [("transpose", "cclock")],
    (0, 1, 1, 0): [("transpose", "cclock_flip")],
    (0, -1, -1, 0): [("transpose", "clock_flip")],
}
"""The filters for a display matrix, by where it maps the first (a, b) and the second axis (c, d)."""
_FIELD: _Filters = [("field", "type=top")]
"""Only the first field of interlaced pictures is kept. Its lines show one moment, and half the lines are enough at the
stored sizes; two moments in one picture show a moving hand as a comb."""


def upright(frame: av.VideoFrame) -> _Filters:
    """The filters that undo the rotation or mirroring that phones store instead of turning the pixels."""
    side_data: Any = frame.side_data  # PyAV's types call it a dict of numbers
    data = side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return []
    axes = np.frombuffer(data, dtype="<i4", count=9).reshape(3, 3)[:2, :2].astype(np.float64)
    across = abs(axes[0, 1]) > abs(axes[0, 0])
    kept = axes * (np.eye(2)[::-1] if across else np.eye(2))  # to the nearest right angle
    a, b, c, d = np.sign(kept).astype(int).ravel().tolist()
    return _UPRIGHT.get((a, b, c, d), [])


def tag_colours(frame: av.VideoFrame) -> None:
    """Give an untagged high-definition frame the matrix that players assume for its size: BT.709.

    Untagged smaller frames stay BT.601, FFmpeg's default.
    """
    if frame.colorspace == _UNTAGGED and not frame.format.is_rgb and (frame.width >= 1280 or frame.height > 576):
        frame.colorspace = _BT709


def crop_box(crop: Crop, width: int, height: int, aspect: float) -> tuple[int, int, int, int]:
    """``(left, top, width, height)`` in whole pixels of an upright picture; even sizes of at least 2.

    Args:
        crop: the part to keep.
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
    """The interval widened around its centre to ``side``, within 0..limit."""
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


def _swaps_sides(turns: _Filters) -> bool:
    """Whether turning upright swaps width and height."""
    return any(name == "transpose" for name, _ in turns)


def _lines_per_output_line(filters: _Filters) -> int:
    """Lines of the picture per line after the filters."""
    return 2 if filters is _FIELD else 1


class Pictures:
    """Converts the frames of one segment. All results have the size of the first one, even if the source changes size.

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
        self._graph_key: tuple[Any, ...] = ()
        self._last: tuple[av.VideoFrame, av.VideoFrame] | None = None

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The stored picture of ``frame``; a repeated frame returns the same object."""
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
        filters = upright(frame) or (_FIELD if frame.interlaced_frame else [])
        aspect = 1 / self.aspect if _swaps_sides(filters) else self.aspect
        part = self._upright_part(frame, filters, aspect)
        if self.size is None:
            self.size = stored_size(part.width, part.height * _lines_per_output_line(filters), aspect, self.short_side)
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

    def _upright_part(self, frame: av.VideoFrame, filters: _Filters, aspect: float) -> av.VideoFrame:
        """Undo the display rotation that phones store instead of turning the pixels, or take one field, then crop."""
        if not filters and self.crop is None:
            return frame
        key = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, *filters)
        if key != self._graph_key:
            self._graph, self._graph_key = self._build_graph(frame, filters, aspect), key
        self._graph.vpush(frame)
        return self._graph.vpull()

    def _build_graph(self, frame: av.VideoFrame, filters: _Filters, aspect: float) -> Graph:
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
        nodes = [source, *(graph.add(name, settings) for name, settings in filters)]
        if self.crop is not None:
            width, height = (frame.height, frame.width) if _swaps_sides(filters) else (frame.width, frame.height)
            lines = _lines_per_output_line(filters)
            x, y, wide, high = crop_box(self.crop, width, height // lines, aspect / lines)
            nodes.append(graph.add("crop", f"{wide}:{high}:{x}:{y}"))
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        return graph
