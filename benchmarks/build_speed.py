"""What building video shards costs: against bare ffmpeg on the same clips, from 1 to 2 workers, and against ``cp``.

    python benchmarks/build_speed.py [--quick] [--out FILE]

* transcode: CPU-seconds (user + system, all processes) per clip for cut, scale to 256 pixels and encode, against one
  ``ffmpeg`` process per clip with the same options and one thread. The peer is the ``ffmpeg`` of the system or of the
  package imageio-ffmpeg; without either, a minimal PyAV loop (decode, one conversion, encode; no checks, no tar).
  Originals come from SLT_SHARED_DATA where present (Slovak sign language, 852 x 480); 720p is generated.
* long video: clips of 5 s cut from one 720p video with a key frame every 10 s, neighbours in one pass or singly.
* workers: clips per second of one build with 1 and with 2 processes. Wants an idle machine with two cores.
* passthrough: bytes per second of files of 100 to 400 KB that are stored unchanged, against ``cp`` of the same files;
  both end with a sync. Every frame is decoded once. Reading, checksum and writing overlap in three threads: wants an
  idle machine with two cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from receipt import ROOT, Claim, write_receipt

from shards.build.build import BuildOptions, build
from shards.media.video import VideoOptions, probe, transcode, transcode_pieces
from shards.schema import Segment, VideoFile

SHARED = Path(os.environ.get("SLT_SHARED_DATA", ROOT.parent / "shared" / "data"))
X264 = "threads=1:lookahead-threads=1:sync-lookahead=0:cpu-independent=1"
OPTIONS = VideoOptions()


@dataclass
class Clips:
    """A corpus of whole files."""

    paths: list[Path]
    name: str = "clips"

    def segments(self) -> Iterator[Segment]:
        for path in self.paths:
            yield Segment("clips", path.stem, "train", f"clip {path.stem}", VideoFile(path))


# -- inputs ----------------------------------------------------------------------------------------------------------
def moving_picture(frames: int, width: int, height: int, seed: int) -> Iterator[np.ndarray]:
    """A smooth background with a body and two moving hands, and a little noise: about as hard to encode as a signer."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    background = np.stack([40 + 60 * x / width, 60 + 60 * y / height, 90 + 20 * np.sin(x / 60)], -1)
    noise = rng.normal(0, 2, (4, height, width, 1)).astype(np.float32)
    for number in range(frames):
        image = background + noise[number % 4]
        for phase, colour in ((0.0, (220, 170, 140)), (2.1, (210, 160, 130)), (4.0, (60, 60, 160))):
            cx = width * (0.5 + 0.2 * np.sin(number / 9 + phase + seed))
            cy = height * (0.55 + 0.2 * np.cos(number / 7 + phase))
            image[(x - cx) ** 2 + (y - cy) ** 2 < (height / 9) ** 2] = colour
        yield image.clip(0, 255).astype(np.uint8)


def write_video(path: Path, frames: int, size: tuple[int, int], gop: int, seed: int = 0) -> Path:
    """An H.264 file as cameras and video sites deliver them."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"crf": "21", "preset": "veryfast"})
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        stream.codec_context.gop_size = gop
        for image in moving_picture(frames, *size, seed):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        output.mux(stream.encode())
    return path


def originals(folder: Path, quick: bool) -> dict[str, list[Path]]:
    """Clips per kind of source."""
    found = {
        "720p generated": [write_video(folder / f"hd{n}.mp4", 100, (1280, 720), 250, n) for n in range(1 + (not quick))]
    }
    shared = sorted((SHARED / "spj" / "originals").glob("*.mp4"))
    return ({"480p Slovak originals": shared[: 2 if quick else None]} if shared else {}) | found


# -- measuring -------------------------------------------------------------------------------------------------------
def cpu_seconds(work: Callable[[], Any], runs: int) -> float:
    """Least user + system time of this process and its children over the runs."""
    return min(_cpu_once(work) for _ in range(runs))


def _cpu_once(work: Callable[[], Any]) -> float:
    def used() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    before = used()
    work()
    return used() - before


def wall_seconds(work: Callable[[], Any], runs: int) -> float:
    """Least wall time over the runs."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def find_ffmpeg() -> str | None:
    """The ffmpeg program: of the system, or the one inside imageio-ffmpeg."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg
    except ImportError:
        return None
    return str(imageio_ffmpeg.get_ffmpeg_exe())


def bare_ffmpeg(program: str, path: Path, out: Path) -> None:
    """One process: decode, scale, encode with the options of the stored form, one thread each."""
    info = probe(path)
    scale = min(1.0, OPTIONS.short_side / min(info.width, info.height))
    size = f"{max(2, round(info.width * scale / 2) * 2)}:{max(2, round(info.height * scale / 2) * 2)}"
    encode = ["-c:v", "libx264", "-preset", OPTIONS.preset, "-crf", str(OPTIONS.crf), "-g", str(OPTIONS.gop)]
    encode += ["-bf", "0", "-tune", "fastdecode", "-pix_fmt", "yuv420p", "-threads", "1", "-x264-params", X264]
    reading = [program, "-y", "-nostdin", "-loglevel", "error", "-threads", "1", "-i", str(path), "-an"]
    scaling = ["-filter_threads", "1", "-vf", f"scale={size}:flags=bicubic", "-fps_mode", "cfr", "-r", "25"]
    subprocess.run([*reading, *scaling, *encode, str(out)], check=True)


def bare_libav(path: Path, out: Path) -> None:
    """The least a program around the libraries can do."""
    reformatter = VideoReformatter()
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        stream = source.streams.video[0]
        stream.thread_type = "NONE"
        scale = min(1.0, OPTIONS.short_side / min(stream.width, stream.height))
        settings = {"crf": str(OPTIONS.crf), "preset": OPTIONS.preset, "tune": "fastdecode", "x264-params": X264}
        encoder = target.add_stream("libx264", rate=25, options=settings)
        encoder.width, encoder.height = (round(side * scale / 2) * 2 for side in (stream.width, stream.height))
        encoder.pix_fmt = "yuv420p"
        encoder.codec_context.gop_size, encoder.codec_context.max_b_frames = OPTIONS.gop, 0
        for number, frame in enumerate(source.decode(stream)):
            picture = reformatter.reformat(
                frame, encoder.width, encoder.height, "yuv420p", interpolation="BICUBIC", threads=1
            )
            picture.pts, picture.time_base, picture.pict_type = number, Fraction(1, 25), 0
            target.mux(encoder.encode(picture))
        target.mux(encoder.encode())


# -- claims ----------------------------------------------------------------------------------------------------------
def transcoding(folder: Path, quick: bool) -> list[Claim]:
    runs, program = 2 if quick else 3, find_ffmpeg()
    peer_name = Path(program).name if program else "PyAV minimal loop"
    claims = []
    for kind, paths in originals(folder, quick).items():
        size = sum(path.stat().st_size for path in paths)
        peer = cpu_seconds(
            lambda paths=paths: [  # type: ignore[misc]
                bare_ffmpeg(program, path, folder / "bare.mp4") if program else bare_libav(path, folder / "bare.mp4")
                for path in paths
            ],
            runs,
        )
        ours = cpu_seconds(
            lambda paths=paths: build(Clips(paths), _fresh(folder / "set"), BuildOptions()),  # type: ignore[misc]
            runs,
        )
        detail = {"peer": peer_name, "clips": len(paths), "mb_per_second": size / ours / 1e6}
        speed = (len(paths) / ours, len(paths) / peer)
        claims.append(
            Claim(f"build, {kind}", *speed, speed[0] / speed[1], 0.9, "clips per CPU-second", runs, detail=detail)
        )
    return claims


def long_video(folder: Path, quick: bool) -> Claim:
    """Neighbouring clips of one video: in one pass against one by one."""
    pieces = 4 if quick else 8
    path = write_video(folder / "long.mp4", 25 * (6 * pieces + 4), (1280, 720), 250)
    spans = [(3 + 6.0 * number, 3 + 6.0 * number + 5.0) for number in range(pieces)]
    media = [VideoFile(path, start, end) for start, end in spans]
    together = cpu_seconds(lambda: transcode_pieces(media, OPTIONS), 2)
    single = cpu_seconds(lambda: [transcode(piece, OPTIONS) for piece in media], 2)
    speed = (pieces / together, pieces / single)
    detail = {"peer": "each clip by itself", "key_frame_every_seconds": 10}
    return Claim("cuts of one long video", *speed, speed[0] / speed[1], 1.1, "clips per CPU-second", 2, detail=detail)


def scaling(folder: Path, quick: bool) -> Claim:
    """One build with 1 and with 2 workers; both pay the start of their processes."""
    sources = [path for paths in originals(folder, True).values() for path in paths]
    copies = []
    for number in range(12 if quick else 40):
        copies.append(folder / f"copy{number:03d}.mp4")
        shutil.copy(sources[number % len(sources)], copies[-1])
    times = [
        wall_seconds(lambda n=n: build(Clips(copies), _fresh(folder / "set"), BuildOptions(), n), 1 if quick else 2)  # type: ignore[misc]
        for n in (1, 2)
    ]
    speed = (len(copies) / times[1], len(copies) / times[0])
    cores = len(os.sched_getaffinity(0))
    return Claim(
        "2 workers against 1", *speed, speed[0] / speed[1], 1.8, "clips per second", 2, detail={"cores": cores}
    )


def ready_files(folder: Path, number: int) -> list[Path]:
    """Files in the stored form, 100 to 400 KB each, as a sentence of 3 to 10 s has."""
    folder.mkdir()
    first = []
    for seed, frames in enumerate((75, 100, 125, 150, 175, 200, 225, 250)):
        source = write_video(folder.with_name("source.mp4"), frames, (854, 480), 250, seed)
        first.append(transcode(VideoFile(source), VideoOptions(crf=18)))
    paths = [folder / f"{place:04d}.mp4" for place in range(number)]
    for place, path in enumerate(paths):
        path.write_bytes(first[place % len(first)])
    return paths


def passthrough(folder: Path, quick: bool) -> Claim:
    """Copies and builds in turn, after a sync each: the same bytes are read from memory and end on the disk."""
    paths, runs = ready_files(folder / "ready", 200 if quick else 800), 3 if quick else 9
    size = sum(path.stat().st_size for path in paths) / 1e6

    def copy() -> None:
        subprocess.run(["cp", "-r", str(folder / "ready"), str(folder / "out")], check=True)
        subprocess.run(["sync", "-f", str(folder / "out")], check=True)

    def store() -> None:
        build(Clips(paths), folder / "out", BuildOptions())

    works: dict[str, Callable[[], Any]] = {"cp": copy, "build": store}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for run in range(runs):
        for name, work in works.items():
            if name == "build" and run > 1:
                continue  # far slower: two runs are enough
            _fresh(folder / "out")
            os.sync()
            began = time.perf_counter()
            cpu = _cpu_once(work)
            found[name].append((time.perf_counter() - began, cpu))
    speeds = {name: size / min(wall for wall, _ in times) for name, times in found.items()}
    per_mb = {name: 1e3 * min(cpu for _, cpu in times) / size for name, times in found.items()}
    detail = {"peer": "cp -r and sync", "clips": len(paths), "mb": round(size, 1)}
    detail |= {"clips_per_second": speeds["build"] / size * len(paths), "cpu_ms_per_mb": per_mb["build"]}
    detail |= {"cpu_ms_per_mb_cp": per_mb["cp"]}
    numbers = (speeds["build"], speeds["cp"], speeds["build"] / speeds["cp"])
    return Claim("passthrough, every frame decoded", *numbers, 0.02, "MB/s", runs, detail=detail)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer clips and runs")
    parser.add_argument("--only", help="one part: transcoding, long_video, scaling or passthrough")
    parser.add_argument("--out", type=Path, help="write the rows as JSON lines")
    arguments = parser.parse_args()
    rows: list[Claim] = []
    for measure in (transcoding, long_video, scaling, passthrough):
        if arguments.only not in (None, measure.__name__):
            continue
        with tempfile.TemporaryDirectory(prefix="build-speed-") as scratch:
            print(f"{measure.__name__} ...", file=sys.stderr)
            found = measure(Path(scratch), arguments.quick)
            rows += found if isinstance(found, list) else [found]
    write_receipt(rows, arguments.out, ("av", "numpy", "pyarrow"))
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
