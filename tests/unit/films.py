"""Long test videos of the synthetic signer: sentences with rests between them, at known times."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from shards.corpora import synthetic_grammar as grammar
from shards.corpora.synthetic_render import RESTING, SIGNERS, Pose, Stage, encode, sentence_poses

FPS, SIZE = 12.5, 64


def write_film(
    path: Path, sentences: int, rest_seconds: Sequence[float] = (0.8,), seed: int = 0
) -> list[tuple[float, float]]:
    """Write a video and return where its sentences begin and end, in seconds.

    ``rest_seconds``: of the rests in order, again from the first one when there are fewer; 0 joins two sentences.
    """
    rng, signer = random.Random(seed), SIGNERS[seed % len(SIGNERS)]
    stage, poses, times = Stage(signer, SIZE, rng), list[Pose](), []
    for number in range(sentences):
        poses += [RESTING] * round(rest_seconds[number % len(rest_seconds)] * FPS)
        signed, _ = sentence_poses(grammar.sample(rng)[1], signer, FPS, rng)
        times.append((len(poses) / FPS, (len(poses) + len(signed)) / FPS))
        poses += signed
    poses += [RESTING] * round(0.8 * FPS)
    path.write_bytes(encode(map(stage.frame, poses), SIZE, FPS, 18))
    return times
