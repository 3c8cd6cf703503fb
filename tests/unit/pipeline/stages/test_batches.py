"""Micro-batches computed by hand: documents stay apart, positions restart, nothing real is masked."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.inference.clips import pack_clips
from pipeline.models.attention import Spans
from pipeline.models.clip_layout import ClipLayout, ClipSizes
from pipeline.models.processing import LlavaSltProcessor, ProcessorOptions
from pipeline.models.text_cache import TextFeatureCache
from pipeline.stages.batches import ContrastiveCollate, PackCollate, TranslationCollate, to_device
from shards.load.documents import Pack
from shards.schema import text_hash
from tests.unit.pipeline.models.test_contrastive import TableEncoder, cached
from tests.unit.pipeline.models.tiny import bpe_tokenizer

PAD = 9
SIZES = ClipSizes(window_frames=4, stride=2, max_frames=8)


def documents(*lengths_and_first: tuple[int, int]) -> list[Pack]:
    """Token ids counted up from a first id."""
    return [pack_of(*(np.arange(first, first + length, dtype=np.uint16) for length, first in lengths_and_first))]


def pack_of(*documents: np.ndarray) -> Pack:
    return Pack(np.concatenate(documents), np.array([len(document) for document in documents]))


def test_packs_by_hand() -> None:
    batch = PackCollate(block_tokens=8, pad_id=PAD)([documents((3, 10), (2, 20)), documents((8, 30))])
    assert batch["input_ids_BL"].tolist() == [
        [10, 11, 12, 20, 21, PAD, PAD, PAD],
        [30, 31, 32, 33, 34, 35, 36, 37],
    ]
    assert batch["targets_BL"].tolist() == [
        [11, 12, -100, 21, -100, -100, -100, -100],
        [31, 32, 33, 34, 35, 36, 37, -100],
    ]
    packed = batch["packed"]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert packed["documents"].borders.tolist() == [0, 3, 5, 8, 16], "the padded tail is a document of its own"
    assert packed["documents"].longest == 8 and batch["document_lengths"].tolist() == [3, 2, 8]
    assert batch["valid_tokens"] == 2 + 1 + 7 and batch["samples"] == 3
    assert batch["input_ids_BL"].dtype == batch["targets_BL"].dtype == torch.int64


def test_every_target_is_the_next_token_of_its_own_document() -> None:
    generator = np.random.default_rng(0)
    packs = [documents(*((int(n), 1000 * at) for at, n in enumerate(generator.integers(1, 9, 4)))) for _ in range(5)]
    batch = PackCollate(40, PAD)(packs)
    ids_BL, targets_BL, positions_BL = batch["input_ids_BL"], batch["targets_BL"], batch["packed"]["position_ids"]
    scored_BL = targets_BL != -100
    assert torch.equal(targets_BL[scored_BL], ids_BL.roll(-1, dims=1)[scored_BL]), "each stands at the token before it"
    assert (positions_BL.roll(-1, dims=1)[scored_BL] > 0).all(), "a first token has nothing to be predicted from"
    assert ((targets_BL - ids_BL)[scored_BL] == 1).all(), "a token and its target are of the same document"
    assert (
        batch["valid_tokens"] == int(scored_BL.sum()) == sum(len(d) - 1 for [pack] in packs for d in pack.documents())
    )


def test_a_document_of_one_token_and_pad_ids_that_occur_in_text() -> None:
    batch = PackCollate(5, PAD)([[pack_of(np.array([7]), np.array([PAD, 8, PAD]))]])
    assert batch["input_ids_BL"].tolist() == [[7, PAD, 8, PAD, PAD]]
    assert batch["targets_BL"].tolist() == [[-100, 8, PAD, -100, -100]], "a real token that equals the padding counts"
    assert batch["valid_tokens"] == 2


@dataclass
class Row:
    text: str
    text_hash: int


def clip(frames: int, value: int, text: str) -> tuple[np.ndarray, Row]:
    return np.full((frames, 2, 2, 3), value, np.uint8), Row(text, len(text))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TextFeatureCache:
    """Of a text of n letters the sentence feature (n, 2n) and n tokens."""
    features = {text: ([len(text), 2.0 * len(text)], [[1.0, 0.0]] * len(text)) for text in ("one", "three")}
    table = pa.table({"text": list(features), "text_hash": [len(text) for text in features]})
    return cached(tmp_path_factory.mktemp("texts"), TableEncoder(features), table)


def test_clips_are_packed_over_items(texts: TextFeatureCache) -> None:
    items = [[clip(2, 5, "one"), clip(1, 6, "three")], [clip(3, 7, "one")]]
    batch = ContrastiveCollate(SIZES, texts)(items)
    assert batch["frames_NHWC"][:, 0, 0, 0].tolist() == [5, 5, 6, 7, 7, 7]
    assert batch["frames_NHWC"].dtype == torch.uint8 and batch["frames_NHWC"].shape == (6, 2, 2, 3)
    assert batch["frame_lengths_B"].tolist() == [2, 1, 3] and batch["text_ids_B"].tolist() == [3, 5, 3]
    assert batch["samples"] == batch["valid_tokens"] == 3 and [row.text for row in batch["rows"]] == [
        "one", "three", "one",
    ]  # fmt: skip
    assert batch["text_BD"].tolist() == [[3, 6], [5, 10], [3, 6]] and batch["tokens_ND"].shape == (11, 2)
    assert batch["token_lengths"] == [3, 5, 3]
    assert batch["word_lengths"] == batch["layout"].word_lengths_B.tolist(), "a list, which stays on the host"
    assert len(pack_clips(items, SIZES)["rows"]) == 3
    assert batch["layout"].sizes == SIZES and batch["layout"].frame_samples_N.tolist() == [0, 0, 1, 2, 2, 2]


def test_another_text_of_a_sample_has_its_own_features_and_the_sample_s_identity(tmp_path: Path) -> None:
    named = {text: text_hash(text) for text in ("one", "uno")}
    features = {"one": ([1.0], [[1.0]]), "uno": ([2.0], [[2.0]] * 3)}
    table = pa.table({"text": list(named), "text_hash": list(named.values())})
    collate = ContrastiveCollate(SIZES, cached(tmp_path, TableEncoder(features), table), several=True)
    frames = np.zeros((2, 2, 2, 3), np.uint8)
    batch = collate([[(frames, Row("uno", named["one"])), (frames, Row("one", named["one"]))]])
    assert batch["text_BD"].tolist() == [[2.0], [1.0]] and batch["token_lengths"] == [3, 1]
    assert batch["text_ids_B"].tolist() == [named["one"]] * 2, "neither is the other's negative"


def test_layouts_move_with_the_batch(texts: TextFeatureCache) -> None:
    batch = ContrastiveCollate(SIZES, texts)([[clip(2, 5, "one"), clip(5, 6, "three")]])
    moved = to_device(batch, torch.device("meta"))["layout"]
    assert isinstance(moved, ClipLayout) and isinstance(moved.windows, Spans) and moved.sizes == SIZES
    assert moved.frame_lengths_B.device.type == moved.windows.borders.device.type == "meta"
    assert moved.windows.equal == batch["layout"].windows.equal and moved.longest_frames == 5


def test_translation_batches_count_the_answer(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(tmp_path)
    processor = LlavaSltProcessor(tokenizer, ProcessorOptions(prompt="signs: {video} sentence:", stride=2))
    collate = pickle.loads(pickle.dumps(TranslationCollate(processor, SIZES)))  # loader workers receive it so
    batch = collate([[clip(3, 1, "here")], [clip(5, 2, "I am here")]])
    answers = [len(tokenizer(" " + text, add_special_tokens=False)["input_ids"]) + 1 for text in ("here", "I am here")]
    places = batch["answers"]
    prompt = len(processor.before_ids) + len(processor.after_ids)
    sizes = [prompt + 2 + answers[0], prompt + 3 + answers[1]]
    assert places["packed"]["documents"].borders.tolist() == [0, sizes[0], sum(sizes)]
    ends = [*range(sizes[0] - answers[0], sizes[0]), *range(sum(sizes) - answers[1], sum(sizes))]
    assert (places["label_positions_N"] + 1).tolist() == ends, "the answer and its eos"
    assert batch["valid_tokens"] == sum(answers) == len(places["targets_N"])
    first = len(processor.before_ids)
    expected = [first, first + 1, *range(sizes[0] + first, sizes[0] + first + 3)]
    assert places["visual_positions_M"].tolist() == expected and batch["samples"] == 2


def test_collates_travel_to_worker_processes(texts: TextFeatureCache) -> None:
    collate = PackCollate(4, 0)
    assert pickle.loads(pickle.dumps(collate)) == collate
    items = [[clip(2, 5, "one")]]
    there = ContrastiveCollate(SIZES, texts)
    there(items)  # with files open here
    assert torch.equal(pickle.loads(pickle.dumps(there))(items)["tokens_ND"], there(items)["tokens_ND"])
