"""Subtitles for whole videos: memory and speed over an hour against a minute, and how well pauses find sentences.

    python benchmarks/long_video.py [--quick] [--out FILE]

A minute of the synthetic signer (sentences of known borders, rests between them) is translated by
`slt translate --long` with a tiny model, and an hour: the same minute sixty times. Each runs in a process of its own,
whose peak memory (RSS) counts. The sentences that pauses find are compared with the true ones, for three signers; with
SLT_SHARED_DATA also for forty recorded sentences of Slovak Sign Language, joined with 0.8 seconds of rest between them.
The defaults were chosen on such videos, so these figures say that the method works, not how it fares elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from receipt import ROOT, Claim, write_receipt

from pipeline.evaluate.broadcasts import Subtitled, segmentation
from pipeline.inference.load import VIDEO_FORM
from shards.corpora.captions import Caption
from shards.media.motion import Motion, PauseSpans, SpanOptions
from shards.media.playback import play
from shards.media.video import VideoOptions
from tests.unit.films import FPS, SIZE, write_film
from tests.unit.pipeline.exported import save_export

Times = list[tuple[float, float]]
FORM = VideoOptions(short_side=SIZE, fps=FPS)
SENTENCES, REST_SECONDS = 16, 0.8
TARGET_MEMORY, TARGET_F1 = 1.1, 95.0


def make_export(folder: Path) -> Path:
    """A tiny model with random weights that takes ten seconds at once."""
    export = save_export(folder)
    (export / VIDEO_FORM).write_text(json.dumps({"short_side": SIZE, "fps": FPS}))
    config = export / "processor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_frames": 32, "frame_stride": 4}))
    return export


def repeated(source: Path, target: Path, times: int) -> float:
    """The video so many times in a row, without encoding it again; returns its seconds."""
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.dts is not None]
        length = sum(int(packet.duration or 0) for packet in packets)
        with av.open(str(target), "w") as output:
            copy = output.add_stream_from_template(stream)
            for number in range(times):
                for packet in packets:
                    packet.stream = copy
                    packet.pts, packet.dts = (
                        packet.pts + (length if number else 0),
                        packet.dts + (length if number else 0),
                    )
                    shifted = av.Packet(bytes(packet))
                    shifted.pts, shifted.dts, shifted.duration = packet.pts, packet.dts, packet.duration
                    shifted.time_base, shifted.is_keyframe, shifted.stream = packet.time_base, packet.is_keyframe, copy
                    output.mux(shifted)
        return float(length * times * stream.time_base)


def translate(video: Path, export: Path, out: Path) -> tuple[float, float, int]:
    """Peak memory in MiB, seconds, and the subtitles of one run of the command."""
    program = (
        "import resource, sys; from launch.slt import app; sys.argv = ['slt', *sys.argv[1:]]\n"
        "try:\n    app()\nfinally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    sets = ["--set", "max_new_tokens=5", "--set", "num_beams=1", "--set", "device=cpu"]
    command = [sys.executable, "-c", program, "translate", str(video), "--long", "--model", str(export)]
    began = time.monotonic()
    done = subprocess.run([*command, "--out", str(out), *sets], cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stderr.split()[-1]) / 1024, time.monotonic() - began, out.read_text().count("-->")


def found(video: Path, form: VideoOptions) -> tuple[Times, float]:
    """Times of the sentences that pauses find, and the length of the video."""
    with play(video, form) as playback:
        motion, finder = Motion(), PauseSpans(SpanOptions(), playback.rate, 20.0)
        spans, frames = [], 0
        for picture in playback.pictures:
            spans += finder.push(motion(picture))
            frames += 1
        spans += finder.finish()
        return [(playback.seconds(s.start), playback.seconds(s.stop)) for s in spans], playback.seconds(frames)


def joined(clips: list[Path], target: Path) -> Times:
    """Recorded sentences in one video, the last picture of each held for the rest; returns their times."""
    times, number = [], 0
    with av.open(str(target), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 454, 256, "yuv420p"
        for clip in clips:
            with av.open(str(clip)) as container:
                pictures = [f.reformat(454, 256, "yuv420p") for f in container.decode(video=0)]
            times.append((number / 25, (number + len(pictures)) / 25))
            for picture in [*pictures, *[pictures[-1]] * round(REST_SECONDS * 25)]:
                picture.pts, picture.time_base, picture.pict_type = number, Fraction(1, 25), 0
                output.mux(stream.encode(picture))
                number += 1
        output.mux(stream.encode())
    return times


def quality(name: str, videos: list[tuple[Path, Times]], form: VideoOptions) -> Claim:
    """Segment F1 of the sentences that pauses find."""
    pairs = []
    for video, gold in videos:
        times, seconds = found(video, form)
        sides = [[Caption(a, b, "x", n) for n, (a, b) in enumerate(side)] for side in (gold, times)]
        pairs.append(Subtitled(video.stem, seconds, *sides))
    score = segmentation(pairs)
    detail = {"true": score.reference_segments, "found": score.hypothesis_segments, "iou": round(score.iou, 2)}
    return Claim(f"segment F1, {name}", score.segment_f1, None, None, TARGET_F1, "percent", len(videos), True, detail)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ten minutes instead of an hour")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    options = parser.parse_args()
    times = 10 if options.quick else 60
    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        folder = Path(scratch)
        export = make_export(folder)
        films = [
            (folder / f"{seed}.mp4", write_film(folder / f"{seed}.mp4", SENTENCES, (REST_SECONDS,), seed))
            for seed in range(3)
        ]
        seconds = repeated(films[0][0], folder / "long.mp4", times)
        short = translate(films[0][0], export, folder / "short.vtt")
        long = translate(folder / "long.mp4", export, folder / "long.vtt")
        detail = {
            "seconds_of_video": [round(seconds / times, 1), round(seconds, 1)],
            "subtitles": [short[2], long[2]], "mib": [round(short[0], 1), round(long[0], 1)],
            "pictures": f"{SIZE} x {SIZE} pixels, {FPS} per second",
        }  # fmt: skip
        rows = [
            Claim(
                f"peak memory, {times} minutes / one",
                long[0] / short[0],
                None,
                None,
                TARGET_MEMORY,
                "ratio",
                1,
                False,
                detail,
            ),
            Claim("video per time, tiny model, one core", seconds / long[1], None, None, 1.0, "x real time", 1),
            quality("synthetic signers", films, FORM),
        ]
        if data := os.environ.get("SLT_SHARED_DATA"):
            clips = sorted((Path(data) / "spj" / "sentences").glob("*.mp4"))[:40]
            rows.append(
                quality(
                    "Slovak sentences with rests",
                    [(folder / "spj.mp4", joined(clips, folder / "spj.mp4"))],
                    VideoOptions(),
                )
            )
    write_receipt(rows, options.out, ["torch", "numpy", "av"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
