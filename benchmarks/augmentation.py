"""CPU time of augmented clips against clips as they are: what `data.augment` costs a loader worker.

    python benchmarks/augmentation.py [--quick] [--out FILE] [--data FOLDER]

Clips in the stored form from real Slovak signing (SLT_SHARED_DATA; left out with a row that says so where absent) and
from a generated pattern, decoded to 224 x 224 as training does it, once without and once with the augmentations of one
group, and with all that docs/augmentation.md recommends. The ratio is plain / augmented: 0.5 is twice the time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from decode_speed import Clip, generated, stored
from receipt import ROOT, Claim, write_receipt

from pipeline.config.augment_schema import AugmentConfig
from pipeline.inference.augment import Augment
from shards.media.video import decode

SIDE = 224
PLACE = {"crop_area": (0.7, 1.0), "crop_aspect": (0.9, 1.1), "scale": (0.9, 1.1), "shift": 0.05}
COLOUR = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05}
TIME = {"speed": (0.8, 1.2), "drop_frames": 0.1}
GROUPS = {
    "crop, scale and shift": (PLACE, 0.9),
    "brightness and contrast": ({"brightness": 0.2, "contrast": 0.2}, 0.5),
    "all colours": (COLOUR, 0.5),
    "erasing": ({"erase": 1.0}, 0.9),
    "speed and dropped frames": (TIME, 0.9),
    "recommended": ({**PLACE, **COLOUR, **TIME, "erase": 0.25}, 0.5),
}
"""Settings, and the least ratio that is good enough."""


def shown(clip: Clip, number: int, augment: Augment | None) -> int:
    """Frames of a clip as a worker makes them; the number stands for its place in the plan."""
    payload, frames = clip
    if augment is None:
        return len(decode(payload, frames, None, SIDE))
    numbers = augment.frame_numbers(number, 0, frames, 512, 1)
    distinct, places = np.unique(numbers, return_inverse=True)
    images = decode(payload, frames, distinct.tolist(), SIDE, placement=augment.placement(number, 0))
    augment.picture(images, number, 0)
    return len(images if len(distinct) == len(numbers) else images[places])


def milliseconds(clips: list[Clip], augment: Augment | None) -> float:
    """CPU milliseconds per clip."""
    begin = time.process_time()
    for number, clip in enumerate(clips):
        shown(clip, number, augment)
    return (time.process_time() - begin) / len(clips) * 1e3


def compare(name: str, clips: list[Clip], runs: int) -> list[Claim]:
    made = {group: Augment(AugmentConfig.model_validate(settings), 0) for group, (settings, _) in GROUPS.items()}
    found: dict[str, list[float]] = {"plain": [], **{group: [] for group in GROUPS}}
    for _ in range(runs):  # in turn, so that a busy moment hits all
        found["plain"].append(milliseconds(clips, None))
        for group, augment in made.items():
            found[group].append(milliseconds(clips, augment))
    plain, frames = min(found["plain"]), sum(clip[1] for clip in clips) / len(clips)
    return [
        Claim(f"{name}: {group}", min(found[group]), plain, plain / min(found[group]), least, "CPU ms per clip", runs,
              higher_is_better=False, detail={"frames_per_clip": frames, "all": found[group]})
        for group, (_, least) in GROUPS.items()
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six clips each, two runs")
    parser.add_argument("--out", type=Path, help="write the receipt here (JSON lines)")
    default = Path(os.environ.get("SLT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder of the shared corpora")
    options = parser.parse_args()
    count, runs = (6, 2) if options.quick else (12, 4)
    with tempfile.TemporaryDirectory(prefix="slt-bench-") as scratch:
        rows = compare("generated clips, 456x256", generated(Path(scratch), count), runs)
    real = sorted((options.data / "spj" / "sentences").rglob("*.mp4"))[:count]
    if real:
        rows += compare("Slovak signing, 454x256", stored(real), runs)
    else:
        detail = {"reason": f"{options.data / 'spj'} does not exist; set SLT_SHARED_DATA or --data"}
        rows.append(Claim("Slovak signing NOT MEASURED", 0.0, None, None, 0.0, "CPU ms per clip", 0, detail=detail))
    write_receipt(rows, options.out, ["av", "numpy"])
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
