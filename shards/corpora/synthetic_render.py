"""Signers and signs of the synthetic sign language, drawn frame by frame and encoded as H.264.

A sign has what a real sign has: one or two hands, a handshape, a start and an end location in signing space, a
movement between them; NOT also shakes the head. A signer has a body, a speed and an amplitude of their own. Between
two signs the hands travel (co-articulation), and a sign begins nearer to where the last one ended.

Coordinates are those of the body: x to the right from its middle, y down from the top, both in frame heights.
Frames are drawn at twice their size and reduced, so edges are smooth.
"""

from __future__ import annotations

import functools
import io
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageDraw

from shards.corpora.synthetic_grammar import LEXICON, LOCATIONS, NOT, Point

RENDER_VERSION = 1
"""Raised when the same options give other pixels; a corpus made by another version is refused."""

KEY_FRAME_SPACING = 12

Colour = tuple[int, int, int]

REST: Point = (-0.21, 0.95)
REACH, HIGHEST = 0.385, 0.135
"""Farthest a hand goes sideways and up, so that it stays in the picture for every signer."""

# A handshape is a list of strokes (x0, y0, x1, y1, radius) in hand lengths; a negative radius is a ring's.
Stroke = tuple[float, float, float, float, float]
HAND_STROKES: dict[str, tuple[Stroke, ...]] = {
    "fist": ((0, 0, 0, 0, 0.40),),
    "flat_vertical": ((0, -0.36, 0, 0.36, 0.20),),
    "flat_horizontal": ((-0.36, 0, 0.36, 0, 0.20),),
    "point": ((0, 0.28, 0, 0.28, 0.27), (0, 0.2, 0, -0.52, 0.11)),
    "vee": ((0, 0.28, 0, 0.28, 0.27), (0, 0.2, -0.34, -0.5, 0.10), (0, 0.2, 0.34, -0.5, 0.10)),
    "star": (
        (0, 0.05, 0, 0.05, 0.24),
        *((0, 0.05, 0.58 * math.sin(a), 0.05 - 0.58 * math.cos(a), 0.08) for a in (-1.75, -0.9, 0, 0.9, 1.75)),
    ),
    "ring": ((0, 0, 0, 0, -0.44),),
    "wye": ((0, 0.2, 0, 0.2, 0.25), (0, 0.2, -0.55, -0.12, 0.11), (0, 0.2, 0.55, -0.12, 0.11)),
}
RING_THICKNESS = 0.19
HAND_LENGTH = 0.21
OUTLINE = 0.075
"""Width of the dark line around a hand, in hand lengths: keeps it visible in front of the face."""


@dataclass(frozen=True, slots=True)
class Signer:
    name: str
    skin: Colour
    clothes: Colour
    background: Colour
    hair: Colour
    scale: float = 1.0
    hand_scale: float = 1.0
    seconds_per_sign: float = 0.48
    amplitude: float = 1.0


SIGNERS: tuple[Signer, ...] = (
    Signer("anna", (238, 192, 158), (38, 52, 98), (118, 150, 158), (92, 60, 34), 1.0, 1.0, 0.46, 1.0),
    Signer("ben", (134, 84, 56), (222, 216, 198), (150, 182, 214), (28, 22, 20), 1.06, 1.05, 0.52, 1.08),
    Signer("chloe", (206, 148, 108), (24, 78, 70), (222, 218, 204), (40, 28, 22), 0.94, 0.97, 0.44, 0.94),
    Signer("david", (98, 62, 44), (232, 190, 84), (148, 196, 166), (18, 16, 16), 1.03, 1.08, 0.48, 1.04),
    Signer("emma", (232, 182, 140), (110, 34, 62), (66, 78, 104), (190, 140, 70), 0.97, 0.95, 0.50, 0.90),
    Signer("femi", (166, 108, 74), (62, 62, 72), (204, 178, 196), (30, 24, 24), 1.0, 1.02, 0.42, 1.0),
    Signer("hana", (224, 172, 134), (58, 96, 52), (132, 120, 158), (24, 20, 22), 0.96, 0.98, 0.47, 1.02),
    Signer("ivan", (118, 76, 52), (164, 196, 218), (230, 220, 192), (60, 44, 36), 1.04, 1.04, 0.49, 0.97),
)
UNSEEN_SIGNER = Signer("grace", (186, 126, 90), (48, 84, 130), (196, 206, 176), (56, 34, 26), 0.98, 1.0, 0.47, 0.96)
"""Signs only in the split `test_signer`."""

WALL_VARIATION, CLOTHES_VARIATION = 0.3, 0.2
REST_SECONDS = (0.08, 0.16)
TRANSITION_SECONDS = (0.06, 0.22)
DURATION_SPREAD = 0.10
"""Standard deviation of a sign's length, relative."""
CARRY_OVER = 0.10
"""How far a sign's beginning is pulled towards the end of the sign before it."""


@dataclass(frozen=True, slots=True)
class Pose:
    """Both hands in one frame; `right` is the signer's dominant hand. Rotation is a step of `ROTATION_STEP`."""

    right: Point
    left: Point
    right_shape: str
    left_shape: str
    rotation: int = 0
    head_shift: float = 0.0


ROTATION_STEP = 0.09
"""Radians (5 degrees)."""
RESTING = Pose(REST, (-REST[0], REST[1]), "fist", "fist")


def _path_point(path: str, start: Point, end: Point, progress: float, amplitude: float) -> Point:
    """Where the hand is after `progress` (0..1) of the movement."""
    (x0, y0), (x1, y1) = start, end
    turn = 2 * math.pi * progress
    match path:
        case "circle":
            return x0 + 0.085 * amplitude * math.sin(turn), y0 + 0.085 * amplitude * (1 - math.cos(turn)) - 0.085
        case "shake":
            return x0 + 0.085 * amplitude * math.sin(2 * turn), y0
        case "tap":
            return x0, y0 - 0.085 * amplitude * math.sin(2 * turn)
        case "line" | "arc":
            eased = 0.5 - 0.5 * math.cos(math.pi * progress)
            bow = 0.16 * amplitude * math.sin(math.pi * eased) if path == "arc" else 0.0
            length = math.dist(start, end)
            normal = ((y1 - y0) / length, (x0 - x1) / length)
            if normal[1] + x0 * normal[0] > 0:  # upwards, and towards the middle when the movement is upright
                normal = (-normal[0], -normal[1])
            return x0 + (x1 - x0) * eased + normal[0] * bow, y0 + (y1 - y0) * eased + normal[1] * bow
    return start


def _sign_poses(gloss: str, frames: int, signer: Signer, before: Pose, rng: random.Random) -> list[Pose]:
    sign = LEXICON[gloss]
    jitter = (rng.gauss(0, 0.010), rng.gauss(0, 0.010))
    pull = ((before.right[0] - LOCATIONS[sign.start][0]), (before.right[1] - LOCATIONS[sign.start][1]))

    def place(name: str, carry: float) -> Point:
        x, y = LOCATIONS[name]
        neutral_x, neutral_y = -0.15, 0.48  # a large amplitude signs farther from the middle of the signing space
        x, y = neutral_x + (x - neutral_x) * signer.amplitude, neutral_y + (y - neutral_y) * signer.amplitude
        return x + jitter[0] + carry * pull[0], y + jitter[1] + carry * pull[1]

    start = place(sign.start, CARRY_OVER if before is not RESTING else 0.0)
    end = place(sign.end, 0.0) if sign.end != sign.start else start
    rotation = max(-2, min(2, round(rng.gauss(0, 1))))
    poses = []
    for frame in range(frames):
        progress = (frame + 0.5) / frames
        x, y = _path_point(sign.path, start, end, progress, signer.amplitude)
        x, y = max(-REACH, min(REACH, x)), max(HIGHEST, y)
        right = (x + rng.gauss(0, 0.003), y + rng.gauss(0, 0.003))
        left = (max(-right[0], 0.09), right[1]) if sign.hands == 2 else RESTING.left
        if sign.hands == 2:
            right = (min(right[0], -0.09), right[1])
        shake = 0.03 * math.sin(4 * math.pi * progress) if gloss == NOT else 0.0
        left_shape = sign.handshape if sign.hands == 2 else RESTING.left_shape
        poses.append(Pose(right, left, sign.handshape, left_shape, rotation, shake))
    return poses


def _between(before: Pose, after: Pose, frames: int) -> list[Pose]:
    """Hands on their way: positions eased, handshapes change halfway."""
    poses = []
    for frame in range(1, frames + 1):
        share = 0.5 - 0.5 * math.cos(math.pi * frame / (frames + 1))
        right = tuple(a + (b - a) * share for a, b in zip(before.right, after.right, strict=True))
        left = tuple(a + (b - a) * share for a, b in zip(before.left, after.left, strict=True))
        nearer = before if share < 0.5 else after
        poses.append(
            Pose((right[0], right[1]), (left[0], left[1]), nearer.right_shape, nearer.left_shape, nearer.rotation)
        )
    return poses


def sentence_poses(
    glosses: Sequence[str], signer: Signer, fps: float, rng: random.Random
) -> tuple[list[Pose], list[int]]:
    """The poses of a sentence, one per frame, and the frame where each sign starts."""
    speed = signer.seconds_per_sign * math.exp(rng.gauss(0, 0.06))

    def frames_of(seconds: tuple[float, float]) -> int:
        return max(1, round(rng.uniform(*seconds) * fps))

    poses = [RESTING] * frames_of(REST_SECONDS)
    starts = []
    for gloss in glosses:
        frames = max(4, round(speed * fps * math.exp(rng.gauss(0, DURATION_SPREAD))))
        signed = _sign_poses(gloss, frames, signer, poses[-1], rng)
        poses += _between(poses[-1], signed[0], frames_of(TRANSITION_SECONDS))
        starts.append(len(poses))
        poses += signed
    poses += _between(poses[-1], RESTING, frames_of(TRANSITION_SECONDS))
    poses += [RESTING] * frames_of(REST_SECONDS)
    return poses, starts


@functools.lru_cache(maxsize=2048)
def _hand_masks(shape: str, rotation: int, pixels: int, mirrored: bool) -> tuple[Image.Image, Image.Image]:
    """Coverage of a hand with and without its outline: two grey images, `pixels` per hand length."""
    oversample, side = 4, int(pixels * 1.5) + 4
    unit, middle = pixels * oversample, side * oversample / 2
    cos, sin = math.cos(rotation * ROTATION_STEP), math.sin(rotation * ROTATION_STEP)
    flip = -1 if mirrored else 1
    masks = []
    for grow in (OUTLINE, 0.0):
        image = Image.new("L", (side * oversample, side * oversample))
        draw = ImageDraw.Draw(image)
        for x0, y0, x1, y1, radius in HAND_STROKES[shape]:
            ends = [
                (middle + flip * (x * cos - y * sin) * unit, middle + (x * sin + y * cos) * unit)
                for x, y in ((x0, y0), (x1, y1))
            ]
            r = (abs(radius) + grow) * unit
            if radius < 0:
                draw.ellipse(_box(*ends[0], r), outline=255, width=round((RING_THICKNESS + 2 * grow) * unit))
                continue
            draw.line(ends, fill=255, width=round(2 * r))
            for end in ends:
                draw.ellipse(_box(*end, r), fill=255)
        masks.append(image.reduce(oversample))
    return masks[0], masks[1]


def _box(x: float, y: float, radius_x: float, radius_y: float | None = None) -> tuple[float, float, float, float]:
    radius_y = radius_x if radius_y is None else radius_y
    return x - radius_x, y - radius_y, x + radius_x, y + radius_y


def _mix(colour: Colour, share: float, rng: random.Random) -> Colour:
    """Move a colour towards a random one: recordings of one signer differ in wall and clothes."""
    red, green, blue = (round(channel + share * (rng.uniform(30, 225) - channel)) for channel in colour)
    return red, green, blue


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (max(0, min(255, round(channel * factor))) for channel in colour)
    return red, green, blue


def arm(hand: Point, side: int) -> tuple[Point, Point]:
    """Shoulder and elbow of an arm; ``side`` is -1 for the signer's right one, 1 for the left one."""
    shoulder = (0.18 * side, 0.5)
    # Bones are foreshortened in depth: a near hand means a bent arm, a far one a straight arm, without a jump.
    bend = max(0.0, 1 - math.dist(shoulder, hand) / 0.5)
    elbow = ((shoulder[0] + hand[0]) / 2 + 0.13 * side * bend, (shoulder[1] + hand[1]) / 2 + 0.17 * bend)
    return shoulder, elbow


class Stage:
    """One signer in front of one camera: draws poses as frames of `size` x `size` RGB pixels."""

    def __init__(self, signer: Signer, size: int, rng: random.Random) -> None:
        self.size, self._canvas = size, 2 * size
        self.scale = signer.scale * math.exp(rng.gauss(0, 0.02)) * self._canvas
        self._x = (0.5 + rng.gauss(0, 0.015)) * self._canvas
        self._y = 0.5 * self._canvas + rng.gauss(0, 0.012) * self._canvas - 0.5 * self.scale
        light = math.exp(rng.gauss(0, 0.04))
        self._skin, self._hair = _shade(signer.skin, light), _shade(signer.hair, light)
        self._clothes = _shade(_mix(signer.clothes, CLOTHES_VARIATION, rng), light)
        self._sleeve, self._dark = _shade(self._clothes, 0.8), _shade(self._skin, 0.32)
        self._hand = _shade(self._skin, 1.08)
        self.hand_pixels = round(HAND_LENGTH * signer.hand_scale * self.scale)
        self._base = self._draw_base(_shade(_mix(signer.background, WALL_VARIATION, rng), light))

    def at(self, point: Point) -> Point:
        """Pixels on the canvas, which is twice as large as a frame."""
        return self._x + point[0] * self.scale, self._y + point[1] * self.scale

    def _draw_base(self, background: Colour) -> Image.Image:
        """Wall, neck and torso: what does not move."""
        top, bottom = np.array(_shade(background, 1.06), float), np.array(_shade(background, 0.88), float)
        share = np.linspace(0, 1, self._canvas)[:, None, None]
        rows = np.broadcast_to(top + (bottom - top) * share, (self._canvas, self._canvas, 3))
        image = Image.fromarray(rows.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        draw.rectangle((*self.at((-0.05, 0.32)), *self.at((0.05, 0.46))), fill=_shade(self._skin, 0.85))
        torso = [(-0.06, 0.42), (0.06, 0.42), (0.2, 0.47), (0.19, 1.2), (-0.19, 1.2), (-0.2, 0.47)]
        draw.polygon([self.at(point) for point in torso], fill=self._clothes)
        return image

    def frame(self, pose: Pose) -> np.ndarray:
        """One frame, uint8 [size, size, 3]."""
        image = self._base.copy()
        draw = ImageDraw.Draw(image)
        self._draw_head(draw, pose.head_shift)
        self._draw_arm(draw, pose.left, side=1)
        self._draw_arm(draw, pose.right, side=-1)
        self._draw_hand(image, pose.left, pose.left_shape, pose.rotation, mirrored=True)
        self._draw_hand(image, pose.right, pose.right_shape, pose.rotation, mirrored=False)
        return np.asarray(image.reduce(2))

    def _draw_head(self, draw: ImageDraw.ImageDraw, shift: float) -> None:
        def oval(x: float, y: float, radius_x: float, radius_y: float, fill: Colour) -> None:
            draw.ellipse(_box(*self.at((x, y)), radius_x * self.scale, radius_y * self.scale), fill=fill)

        oval(0.5 * shift, 0.205, 0.115, 0.135, self._hair)
        oval(shift, 0.235, 0.098, 0.122, self._skin)
        for eye in (-0.038, 0.038):
            oval(eye + 1.5 * shift, 0.215, 0.014, 0.016, self._dark)
        oval(1.5 * shift, 0.297, 0.034, 0.012, _shade(self._skin, 0.6))

    def _draw_arm(self, draw: ImageDraw.ImageDraw, hand: Point, side: int) -> None:
        """Sleeve from shoulder over elbow to hand; the elbow points outwards and down."""
        joints = [self.at(point) for point in (*arm(hand, side), hand)]
        for colour, width in ((_shade(self._sleeve, 0.55), 0.098), (self._sleeve, 0.072)):
            draw.line(joints, fill=colour, width=round(width * self.scale))
            for joint in joints:
                draw.ellipse(_box(*joint, width * self.scale / 2), fill=colour)

    def _draw_hand(self, image: Image.Image, at: Point, shape: str, rotation: int, mirrored: bool) -> None:
        outlined, plain = _hand_masks(shape, rotation, self.hand_pixels, mirrored)
        x, y = self.at(at)
        corner = (round(x - outlined.width / 2), round(y - outlined.height / 2))
        image.paste(self._dark, corner, outlined)
        image.paste(self._hand, corner, plain)


@dataclass(frozen=True, slots=True)
class Rendering:
    """A signed sentence."""

    stage: Stage
    poses: list[Pose]
    starts: list[int]
    """The frame where each sign starts."""

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 [size, size, 3] each."""
        return (self.stage.frame(pose) for pose in self.poses)


def render(glosses: Sequence[str], signer: Signer, size: int, fps: float, rng: random.Random) -> Rendering:
    """A signed sentence, drawn when its frames are asked for."""
    poses, starts = sentence_poses(glosses, signer, fps, rng)
    return Rendering(Stage(signer, size, rng), poses, starts)


def encode(frames: Iterable[np.ndarray], size: int, fps: float, crf: int) -> bytes:
    """H.264 mp4 as shards store it: yuv420p, constant rate, no B frames, a key frame every 12; deterministic bytes."""
    buffer = io.BytesIO()
    to_yuv = VideoReformatter()  # kept for all frames: setting up a conversion costs more than drawing a frame
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size, stream.max_b_frames = KEY_FRAME_SPACING, 0
        stream.thread_count = 1
        stream.options = {
            "crf": str(crf),
            "preset": "veryfast",
            "tune": "fastdecode",
            "x264-params": "rc-lookahead=0:sync-lookahead=0",
        }
        for pixels in frames:
            frame = to_yuv.reformat(av.VideoFrame.from_ndarray(pixels, format="rgb24"), format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
