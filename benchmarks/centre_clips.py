"""`model.visual.centre_clips` on real signing: what subtracting every clip's mean frame feature gains and loses.

    python benchmarks/centre_clips.py --features FILE.npz [--out FILE] [--steps 150]

Slovak word and sentence clips of one signer (SLT_SHARED_DATA) through frozen DINOv2-small, with centring and without:
a still picture and a clip of four frames find their own sign again (untrained encoder); a clip finds itself when the
camera is moved and darkened (frame features alone, and untrained encoder); the stage itself is trained on words and
sentences and retrieves the texts of held-out sentences and of the words seen by the other camera. Frame features are
computed once and kept in --features. One signer before one camera: what centring is worth for other signers is not
measured. The other camera is simulated. Every figure is a mean over five folds (and seeds). About 15 minutes.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from receipt import ROOT, Claim, write_receipt

from pipeline.config.schema import (
    BackboneConfig,
    ContrastiveConfig,
    TextEncoderConfig,
    VisualConfig,
    WordLevelConfig,
)
from pipeline.evaluate.retrieval import retrieval
from pipeline.losses import Tokens, clamped_scale, sentence_contrastive, token_contrastive
from pipeline.models.contrastive import ContrastiveModel
from pipeline.models.registry import build_text_encoder, build_visual
from pipeline.models.text_cache import TextFeatureCache
from pipeline.models.visual import STILL_CLIP, HierarchicalVisualEncoder
from pipeline.stages.held_out_retrieval import held_out_metrics, pairs_of
from shards.load.reader import wanted_frames
from shards.media.video import decode, probe
from shards.schema import text_hash

PIXELS, SPREAD, NEAR = 112, 12, 8
"""Side of the picture; frames evenly spread over a clip; consecutive frames around its middle."""
BATCH, FOLDS = 64, 5
Features = dict[str, np.ndarray]


def encoder(data: Path, centre: bool, seed: int) -> HierarchicalVisualEncoder:
    torch.manual_seed(seed)
    backbone = BackboneConfig(path=str(data / "models" / "dinov2-small-imgfocus"), train="frozen", pool="cls_mean")
    word = WordLevelConfig(layers=2, window_frames=8, stride=2, heads=4)
    return build_visual(
        VisualConfig(backbone=backbone, width=256, max_frames=64, centre_clips=centre, word=word), PIXELS, torch.float32
    )


def rows(data: Path, table: str) -> list[dict[str, str]]:
    with (data / "spj" / table).open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle, delimiter="\t", quoting=csv.QUOTE_NONE))


def other_camera(payload: bytes, frames: int, wanted: list[int]) -> np.ndarray:
    """Nearer, from the side of the picture, in less and warmer light."""
    side = PIXELS * 5 // 4
    part = decode(payload, frames, wanted, size=side)[:, side - PIXELS :, 4 : 4 + PIXELS]
    return (part * np.array([0.85, 0.75, 0.65])).astype(np.uint8)


def features(data: Path) -> dict[str, np.ndarray]:
    """Pooled frame features, float16: words and sentences spread over the clip, words near their middle and filmed
    by the other camera (at frames the first one does not show where the clip has them)."""
    model = encoder(data, centre=False, seed=0).eval()

    def pooled(frames_THWC: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model.pooled(torch.from_numpy(frames_THWC)).half().numpy()

    found: dict[str, list[np.ndarray]] = {"words": [], "near": [], "camera": [], "sentences": []}
    for name, column, table in (("words", "video_front", "words.tsv"), ("sentences", "video", "sentences.tsv")):
        for row in rows(data, table):
            payload = (data / "spj" / row[column]).read_bytes()
            frames = probe(payload).frames
            wanted = wanted_frames(frames, SPREAD) or list(range(frames))
            found[name].append(pooled(decode(payload, frames, wanted, size=PIXELS)))
            if name == "words":
                first = frames // 2 - NEAR // 2
                found["near"].append(pooled(decode(payload, frames, list(range(first, first + NEAR)), size=PIXELS)))
                moved = [min(number + 1, frames - SPREAD + at) for at, number in enumerate(wanted)]
                found["camera"].append(pooled(other_camera(payload, frames, moved)))
    return {name: np.stack(clips) for name, clips in found.items()}


def own_clip(queries_NE: np.ndarray, keys_NE: np.ndarray) -> float:
    """How many percent of the queries have the key of their own clip nearest."""
    return retrieval(queries_NE, keys_NE, np.arange(len(keys_NE))).video_to_text.recall_at_1


def still(frames_NX: np.ndarray) -> np.ndarray:
    """One frame per clip, [N, X], held as long as the other clips: [N, T, X]."""
    return np.repeat(frames_NX[:, None], SPREAD, axis=1)


def recognised(embed: Callable[[np.ndarray], np.ndarray], found: Features) -> dict[str, float]:
    """`own_clip` of a still picture, of four frames and of the other camera. ``embed``: clips [N, T, X] -> [N, E]."""
    near = found["near"]
    pairs = {
        "still": (still(near[:, 0]), still(near[:, -1])),
        "short": (near[:, : NEAR // 2], near[:, NEAR // 2 :]),
        "camera": (found["camera"], found["words"]),
    }
    return {name: own_clip(embed(first), embed(second)) for name, (first, second) in pairs.items()}


def frames_alone(centre: bool) -> Callable[[np.ndarray], np.ndarray]:
    """All frame features of a clip in a row: what centring leaves of them without any encoder."""

    def embed(clips_NTX: np.ndarray) -> np.ndarray:
        clips_NTX = clips_NTX.astype(np.float64)
        mean_N1X = clips_NTX.mean(1, keepdims=True)
        moves_N = ((clips_NTX - mean_N1X) ** 2).sum((1, 2)) > STILL_CLIP * (clips_NTX**2).sum((1, 2))
        return (clips_NTX - mean_N1X * (moves_N * centre)[:, None, None]).reshape(len(clips_NTX), -1)

    return embed


def encoded(model: HierarchicalVisualEncoder) -> Callable[[np.ndarray], np.ndarray]:
    """Sentence embeddings."""

    def embed(clips_NTX: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model.eval()(*packed(clips_NTX)).sentence_BD.numpy()

    return embed


def packed(clips_BTX: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(clips_BTX).float().flatten(0, 1), torch.full((len(clips_BTX),), clips_BTX.shape[1])


class Training:
    """The stage's model and loss on stored features; sentences ``number % FOLDS == fold`` are held out."""

    def __init__(self, data: Path, found: Features, texts: Texts, centre: bool, fold: int) -> None:
        words, sentences = texts.words, texts.sentences
        out = np.arange(len(sentences)) % FOLDS == fold
        self.clips = np.concatenate([found["words"], found["sentences"][~out]])
        self.texts = [*words, *(text for text, held in zip(sentences, out, strict=True) if not held)]
        self.held = found["sentences"][out], [text for text, held in zip(sentences, out, strict=True) if held]
        self.camera = found["camera"], words
        self.cache, self.config = texts.cache, ContrastiveConfig(embed=384)
        self.model = ContrastiveModel(encoder(data, centre, seed=fold), texts.width, self.config)
        self.model.set_text_statistics(self.cache.statistics())

    def features(self, clips_BTX: np.ndarray, texts: list[str]) -> dict[str, torch.Tensor]:
        text_BD, tokens_ND, self.token_lengths = self.cache.lookup([text_hash(text) for text in texts])
        found: dict[str, torch.Tensor] = self.model(*packed(clips_BTX), text_BD, tokens_ND)
        return found

    def run(self, steps: int, seed: int) -> float:
        """Mean loss of the last tenth of the steps."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.01)
        random, losses = np.random.default_rng(seed), []
        for _ in range(steps):
            batch = random.choice(len(self.texts), BATCH, replace=False)
            losses.append(self.step(optimizer, self.clips[batch], [self.texts[at] for at in batch]))
        return float(np.mean(losses[-max(1, steps // 10) :]))

    def step(self, optimizer: torch.optim.Optimizer, clips_BTX: np.ndarray, texts: list[str]) -> float:
        found = self.features(clips_BTX, texts)
        ids_B = torch.tensor([text_hash(text) for text in texts])
        scales = [clamped_scale(found[name], self.config.max_logit_scale) for name in ("log_scale", "log_token_scale")]
        words = Tokens(found["words_ME"], self.word_lengths(clips_BTX))
        tokens = Tokens(found["tokens_NE"], self.token_lengths)
        loss = sentence_contrastive((found["video_BE"], found["text_BE"]), ids_B, scales[0])
        loss = loss + token_contrastive(words, tokens, ids_B, (scales[0], scales[1]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    def word_lengths(self, clips_BTX: np.ndarray) -> list[int]:
        return [self.model.visual.config.word_count(clips_BTX.shape[1])] * len(clips_BTX)

    @torch.no_grad()
    def scores(self, clips: np.ndarray, texts: list[str]) -> dict[str, float]:
        """Retrieval as the stage scores it (objective `both`)."""
        found = self.features(clips, texts)
        ids_B = torch.tensor([text_hash(text) for text in texts])
        lengths = {"word_lengths": self.word_lengths(clips), "token_lengths": self.token_lengths}
        pairs = pairs_of(found, {"text_ids_B": ids_B, **lengths}, self.config)
        scale = float(clamped_scale(found["log_token_scale"], self.config.max_logit_scale))
        return held_out_metrics(pairs, self.config, scale, torch.device("cpu"))


@dataclass(frozen=True)
class Texts:
    """Slovak words and sentences with their cached text features."""

    words: list[str]
    sentences: list[str]
    cache: TextFeatureCache
    width: int

    @staticmethod
    def read(data: Path, folder: Path) -> Texts:
        words = [row["word_sk"] for row in rows(data, "words.tsv")]
        sentences = [row["translation_sk"] for row in rows(data, "sentences.tsv")]
        path = str(data / "models" / "multilingual-e5-small-pruned")
        e5 = build_text_encoder(TextEncoderConfig(path=path, prefix="query: "))
        cache = TextFeatureCache(folder)
        texts = [*words, *sentences]
        cache.build(pa.table({"text": texts, "text_hash": [text_hash(text) for text in texts]}), e5)
        return Texts(words, sentences, cache, e5.width)


def arm(data: Path, found: Features, texts: Texts, centre: bool, steps: int) -> dict[str, list[float]]:
    """Every figure of one setting, one per fold (seed)."""
    figures: dict[str, list[float]] = {}
    for fold in range(FOLDS):
        one = {f"frames_{name}": value for name, value in recognised(frames_alone(centre), found).items()}
        one |= {f"untrained_{n}": v for n, v in recognised(encoded(encoder(data, centre, fold)), found).items()}
        training = Training(data, found, texts, centre, fold)
        one["loss"] = training.run(steps, fold)
        held, camera = training.scores(*training.held), training.scores(*training.camera)
        one |= {f"held_out_{name}": held[f"video_to_text/{name}"] for name in ("r1", "r5", "median_rank")}
        one["held_out_t2v_r5"] = held["text_to_video/r5"]
        one["camera_to_text_r1"] = camera["video_to_text/r1"]
        one |= {f"trained_{n}": v for n, v in recognised(encoded(training.model.visual), found).items()}
        for name, value in one.items():
            figures.setdefault(name, []).append(value)
    return figures


CLAIMS = {
    "word clip by a moved camera, R@1 of its text among 354 (trained)": "camera_to_text_r1",
    "held-out sentence, same camera, R@5 of its text among 27 (trained)": "held_out_r5",
    "still picture finds its clip's other picture, R@1 of 354 (untrained)": "untrained_still",
    "four frames find the next four, R@1 of 354 (untrained)": "untrained_short",
    "moved camera finds its clip, R@1 of 354 (frame features alone)": "frames_camera",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, required=True, help="where frame features are kept (.npz)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    data = Path(os.environ.get("SLT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (data / "spj").is_dir():
        raise SystemExit(f"no Slovak clips in {data}; set SLT_SHARED_DATA")
    if not options.features.is_file():
        np.savez(options.features, **features(data))
    found: Features = dict(np.load(options.features))
    with tempfile.TemporaryDirectory() as folder:
        texts = Texts.read(data, Path(folder))
        on, off = (arm(data, found, texts, centre, options.steps) for centre in (True, False))
    claims = []
    for text, name in CLAIMS.items():
        ours, peer = float(np.mean(on[name])), float(np.mean(off[name]))
        detail = {"centred": on, "as they are": off} if not claims else {"centred": on[name], "as they are": off[name]}
        claims.append(Claim(text, ours, peer, ours / max(peer, 0.01), 1.0, "percent", FOLDS, detail=detail))
    write_receipt(claims, options.out, ("torch", "transformers"))


if __name__ == "__main__":
    main()
