"""Frames per CPU-second of our decoder against a bare PyAV loop, and against torchcodec where it can be imported.

    python benchmarks/decode_speed.py [--quick] [--out FILE] [--data FOLDER]

Clips in the stored form (short side 256, H.264, key frame every 12) from real Slovak signing (SLT_SHARED_DATA; left
out with a row that says so where absent) and from a generated pattern. Decoded to 224 x 224 RGB: short side resized
fast bilinear, centre cut out. The bare loop does the same without any of our checks (strict decoding, frame counts);
torchcodec 0.13 runs in the peers' environment, decodes at full size and takes nearest neighbours.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from peers.environment import folder as peers_folder
from receipt import ROOT, Claim, write_receipt

from shards.media.video import VideoOptions, decode, probe, transcode
from shards.schema import VideoFile

SIDE, TARGET = 224, 0.9
Clip = tuple[bytes, int]


def stored(paths: list[Path]) -> list[Clip]:
    """Files in the stored form with their frame counts."""
    payloads = [transcode(VideoFile(path), VideoOptions()) for path in paths]
    return [(payload, probe(payload).frames) for payload in payloads]


def generated(folder: Path, count: int) -> list[Clip]:
    """Moving stripes with noise: harder to decode than a signer before a wall."""
    random = np.random.default_rng(0)
    paths = []
    for number in range(count):
        path = folder / f"{number}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"crf": "20"})
            stream.width, stream.height, stream.pix_fmt = 456, 256, "yuv420p"
            columns = np.arange(456)[None, :, None]
            for frame in range(100):
                stripes = (columns * 3 + frame * 5 + number * 40) % 256
                noise = random.integers(0, 24, (256, 456, 3))
                image = np.clip(stripes * 0.85 + noise, 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            container.mux(stream.encode())
        paths.append(path)
    return stored(paths)


def ours(clip: Clip) -> int:
    return len(decode(clip[0], clip[1], size=SIDE))


def bare(clip: Clip) -> int:
    """As few calls as PyAV needs for the same frames."""
    frames = []
    reformatter = VideoReformatter()
    with av.open(io.BytesIO(clip[0]), "r") as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            scale = SIDE / min(frame.width, frame.height)
            width, height = round(frame.width * scale), round(frame.height * scale)
            picture = reformatter.reformat(frame, width, height, "rgb24", interpolation="FAST_BILINEAR", threads=1)
            image = picture.to_ndarray()
            top, left = (height - SIDE) // 2, (width - SIDE) // 2
            frames.append(image[top : top + SIDE, left : left + SIDE])
    return len(np.stack(frames))


def speed(side: Callable[[Clip], int], clips: list[Clip]) -> float:
    """Frames per CPU-second over all clips."""
    begin = time.process_time()
    frames = sum(side(clip) for clip in clips)
    return frames / (time.process_time() - begin)


TORCHCODEC = """
import json, sys, time
from pathlib import Path
import torch
from torchcodec.decoders import VideoDecoder
torch.set_num_threads(1)
payloads = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
best = 0.0
for _ in range(int(sys.argv[2])):
    begin, frames = time.process_time(), 0
    for payload in payloads:
        batch = VideoDecoder(payload, num_ffmpeg_threads=1)[:]
        small = torch.nn.functional.interpolate(batch, scale_factor=224 / min(batch.shape[2:]))
        top, left = (small.shape[2] - 224) // 2, (small.shape[3] - 224) // 2
        frames += len(small[:, :, top : top + 224, left : left + 224].permute(0, 2, 3, 1).contiguous())
    best = max(best, frames / (time.process_time() - begin))
print(json.dumps(best))
"""


def torchcodec(clips: list[Clip], runs: int) -> float | str:
    """Frames per CPU-second, or why there are none. It decodes at full size and resizes with nearest neighbours: the
    fastest way it has (its own Resize transform is slower)."""
    python = peers_folder() / "bin" / "python"
    if not python.exists():
        return f"no environment at {peers_folder()}"
    with tempfile.TemporaryDirectory() as scratch:
        for number, (payload, _) in enumerate(clips):
            (Path(scratch) / f"{number:04d}.mp4").write_bytes(payload)
        command = [str(python), "-c", TORCHCODEC, scratch, str(runs)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if "Error" in line]
        return (lines[0] if lines else "failed")[:200]
    return float(json.loads(done.stdout))


def compare(name: str, clips: list[Clip], runs: int) -> list[Claim]:
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(runs):  # in turn, so that a busy moment hits both
        found["ours"].append(speed(ours, clips))
        found["bare"].append(speed(bare, clips))
    mine, theirs, unit = max(found["ours"]), max(found["bare"]), "frames per CPU-second"
    rows = [Claim(f"{name}: against bare PyAV", mine, theirs, mine / theirs, TARGET, unit, runs, detail=found)]
    other = torchcodec(clips, runs)
    if isinstance(other, str):
        label = f"{name}: torchcodec NOT MEASURED"
        return [*rows, Claim(label, mine, None, None, 0.0, unit, runs, detail={"reason": other})]
    return [*rows, Claim(f"{name}: against torchcodec", mine, other, mine / other, 1.0, unit, runs)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six clips each, two runs")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    default = Path(os.environ.get("SLT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of the shared corpora")
    options = parser.parse_args()
    count, runs = (6, 2) if options.quick else (30, 5)
    rows = []
    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        rows += compare("generated clips, 456x256", generated(Path(scratch), count), runs)
    real = sorted((options.data / "spj" / "sentences").rglob("*.mp4"))[:count]
    if real:
        rows += compare("Slovak signing, 454x256", stored(real), runs)
    else:
        detail = {"reason": f"{options.data / 'spj'} does not exist; set SLT_SHARED_DATA or --data"}
        rows.append(
            Claim("Slovak signing NOT MEASURED", 0.0, None, None, 0.0, "frames per CPU-second", 0, detail=detail)
        )
    write_receipt(rows, options.out, ["av", "numpy"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
