"""What the contrastive stage makes of glosses, and which clips it refuses."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config.augment_schema import ReferencesConfig
from pipeline.config.schema import ContrastiveConfig, ModelConfig
from pipeline.config.supervision_schema import AlignmentConfig, CtcConfig
from pipeline.errors import DataError, RecipeError
from pipeline.inference.clips import pack_clips
from pipeline.models.clip_layout import ClipSizes
from pipeline.models.gloss_vocabulary import GlossVocabulary
from pipeline.models.text_cache import TextFeatureCache
from pipeline.stages.batches import ContrastiveCollate
from pipeline.stages.contrastive import Contrastive, texts_of
from pipeline.stages.data import Plans
from pipeline.stages.glosses import (
    AlignedGlosses,
    FetchWithGlosses,
    GlossTargets,
    check_warm_start,
    gloss_metrics,
    gloss_texts,
)
from shards.format.index import read_index
from shards.format.text_columns import write_column
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from shards.schema import text_hash
from tests.unit.pipeline.models.test_contrastive import TableEncoder, cached, table_of
from tests.unit.shards.shard_sets import in_memory, write_videos

STRIDE = 4
ENCODER: Any = SimpleNamespace(config=SimpleNamespace(word_count=lambda frames: -(-frames // STRIDE)))
SIZES = ClipSizes(window_frames=4, stride=STRIDE, max_frames=64)


def plan(frames: list[int], glosses: list[str], **options: Any) -> Plan:
    return Plan([Source(in_memory("video", frames, gloss=glosses), "train")], PlanOptions(kind="clip", **options))


def told(**ctc: Any) -> ContrastiveConfig:
    return ContrastiveConfig(ctc=CtcConfig(**ctc))


def clip(frames: int, text: str, gloss: str) -> tuple[np.ndarray, Any]:
    row = SimpleNamespace(
        text=text, text_hash=text_hash(text), gloss=gloss, corpus="tiny", sample_id="7", shard="v-0.tar"
    )
    return np.zeros((frames, 2, 2, 3), np.uint8), row


# --- the vocabulary and the plan


def test_the_vocabulary_is_that_of_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = GlossTargets.of(plan([8, 8, 8], ["B A", "A", ""]), ENCODER, told(weight=1, unusable="leave_out"))
    assert found.vocabulary.glosses == ("A", "B")
    assert "2 glosses; 1 of 3 clips are unusable" in caplog.text


def test_no_glosses_at_all() -> None:
    with pytest.raises(RecipeError, match=r"no sample of data\.train has glosses \(contrastive\.glosses=gloss\)"):
        GlossTargets.of(plan([8, 8], ["", " "]), ENCODER, told(weight=1, unusable="leave_out"))


def test_a_clip_without_glosses() -> None:
    with pytest.raises(DataError, match=r"(?s)no glosses \(1 of 2 clips are so\).*ctc\.unusable: leave_out"):
        GlossTargets.of(plan([8, 8], ["A", ""]), ENCODER, told(weight=1))


@pytest.mark.parametrize(
    ("frames", "options"),
    [(4, {"max_frames": 64}), (16, {"max_frames": 64, "frame_stride": 4}), (16, {"max_frames": 4})],
)
def test_a_text_longer_than_its_tokens(frames: int, options: dict[str, int]) -> None:
    """As many frames as the plan keeps of a clip."""
    data = plan([40, frames], ["A", "A B"], **options)
    with pytest.raises(DataError, match="2 glosses need 2 word tokens, the clip has 1") as raised:
        GlossTargets.of(data, ENCODER, told(weight=1))
    assert data.samples.row(1).sample_id in str(raised.value), "the clip is named"


def test_equal_glosses_need_a_blank_between_them() -> None:
    given, video = (GlossTargets(GlossVocabulary(("A", "B")), CtcConfig(order=order)) for order in ("given", "video"))
    assert given.problem(["A", "A"], 2) == "2 glosses need 3 word tokens, the clip has 2"
    assert given.problem(["A", "B", "A"], 3) == ""
    assert video.problem(["A", "B", "A"], 3) == "3 glosses need 4 word tokens, the clip has 3"


def test_a_gloss_head_of_other_glosses_is_not_taken_over(tmp_path: Path) -> None:
    """As many classes, which nothing else would notice."""
    model = ModelConfig.model_validate({"init_from": {"heads": str(tmp_path)}})
    check_warm_start(model, GlossVocabulary(("A", "B")))
    check_warm_start(ModelConfig(), GlossVocabulary(("A", "B")))
    GlossVocabulary(("A", "B")).save(tmp_path)
    check_warm_start(model, GlossVocabulary(("A", "B")))
    with pytest.raises(RecipeError, match=r"tells 2 glosses apart, this run 2, of which 1 are the same; take only"):
        check_warm_start(model, GlossVocabulary(("B", "C")))


# --- micro-batches


def test_classes_of_a_batch() -> None:
    targets = GlossTargets(GlossVocabulary(("A", "B")), CtcConfig(weight=1, unusable="leave_out"))
    rows: Any = [clip(4, "x", gloss)[1] for gloss in ("B  A", "", "A A A", "B")]
    batch = pickle.loads(pickle.dumps(targets)).batch(rows, [2, 2, 4, 1])
    assert batch["gloss_classes_N"].tolist() == [2, 1, 2] and batch["gloss_lengths"] == [2, 0, 0, 1]


def test_an_unusable_clip_of_a_batch_is_named() -> None:
    """Augmentation may shorten a clip that was long enough when the run began."""
    targets = GlossTargets(GlossVocabulary(("A",)), CtcConfig(weight=1))
    rows: Any = [clip(4, "x", "A A")[1]]
    with pytest.raises(DataError, match=r"tiny/7 \(v-0\.tar\): 2 glosses need 3 word tokens, the clip has 1"):
        targets.batch(rows, [1])


FEATURES = {
    text: ([float(number), 1.0], [[float(number), 2.0]] * (number + 1))
    for number, text in enumerate(["one", "two", "B", "A B"])
}


@pytest.fixture
def texts(tmp_path: Path) -> TextFeatureCache:
    return cached(tmp_path, TableEncoder(FEATURES), table_of(*FEATURES))


def test_glosses_are_texts_of_their_own(texts: TextFeatureCache) -> None:
    collate = ContrastiveCollate(SIZES, texts, aligned=AlignedGlosses(texts))
    batch = collate([[clip(5, "one", "A  B"), clip(3, "two", "B")]])
    assert batch["gloss_ids_B"].tolist() == [text_hash("A B"), text_hash("B")]
    assert batch["gloss_token_lengths"] == [4, 3] and batch["frame_lengths"] == [5, 3]
    assert batch["gloss_tokens_ND"][:, 0].tolist() == [3.0] * 4 + [2.0] * 3
    assert batch["tokens_ND"][:, 0].tolist() == [0.0, 1.0, 1.0], "the texts stay the texts"


def test_held_out_batches_hold_no_glosses(texts: TextFeatureCache) -> None:
    batch = ContrastiveCollate(SIZES, texts)([[clip(5, "one", "")]])
    assert not {"gloss_classes_N", "gloss_ids_B"} & batch.keys()


def test_the_texts_to_encode() -> None:
    train, held_out = plan([8, 8, 8], ["B  A", "B A", "A"]), plan([8], ["UNKNOWN"])
    plans = Plans(train, [held_out])
    texts = {text for data in plans.all() for text in data.samples.column("text").to_pylist()}
    assert set(texts_of(plans, ContrastiveConfig())["text"].to_pylist()) == texts
    found = texts_of(plans, ContrastiveConfig(alignment=AlignmentConfig(segment_weight=1)))
    assert set(found["text"].to_pylist()) == texts | {"B A", "A"}, "held-out glosses are not aligned"
    assert found["text_hash"].to_pylist()[-2:] == [text_hash("B A"), text_hash("A")]


def test_alignment_of_a_clip_without_glosses() -> None:
    plans = Plans(plan([8, 8], ["A", ""]), [])
    with pytest.raises(DataError, match=r"(?s)no glosses to align with \(1 of 2 clips have none\).*leave these"):
        texts_of(plans, ContrastiveConfig(alignment=AlignmentConfig(frame_weight=1)))


# --- glosses of a text column


def test_a_text_column_takes_the_place_of_the_index(tmp_path: Path) -> None:
    videos = write_videos(tmp_path / "set", [b"x"] * 3, [8, 8, 8])
    write_column(read_index(videos), "pseudo", [["RAIN NORTH"], [], ["SUN", "RAIN"]], {})
    data = Plan([Source(read_index(videos), "train", columns=("pseudo",))], PlanOptions(kind="clip", max_frames=8))
    assert gloss_texts(data, "pseudo") == ["RAIN NORTH", "", "SUN RAIN"]
    config = ContrastiveConfig(glosses="pseudo", ctc=CtcConfig(weight=1, unusable="leave_out"))
    assert GlossTargets.of(data, ENCODER, config).vocabulary.glosses == ("RAIN", "NORTH", "SUN")

    def fetch(reader: Any, item: np.ndarray) -> list[Any]:
        return [(int(sample), reader.plan.samples.row(int(sample))) for sample in item["sample"]]

    reader: Any = SimpleNamespace(plan=data)
    found: Any = FetchWithGlosses(fetch, "pseudo")(reader, np.array([(2,), (1,)], dtype=[("sample", np.int64)]))
    assert [(frames, row.gloss) for frames, row in found] == [(2, "SUN RAIN"), (1, "")]
    assert found[0][1] == data.samples.row(2)._replace(gloss="SUN RAIN")


@pytest.mark.parametrize(
    ("section", "columns"),
    [({}, ()), ({"glosses": "pseudo"}, ()), ({"ctc": CtcConfig(weight=1)}, ()),
     ({"glosses": "pseudo", "ctc": CtcConfig(set_weight=1)}, ("pseudo",)),
     ({"glosses": "pseudo", "alignment": AlignmentConfig(frame_weight=1)}, ("pseudo",))],
)  # fmt: skip
def test_a_column_is_opened_where_it_is_read(section: dict[str, Any], columns: tuple[str, ...]) -> None:
    data = SimpleNamespace(references=ReferencesConfig())
    recipe: Any = SimpleNamespace(contrastive=ContrastiveConfig(**section), data=data)
    assert Contrastive.text_columns(recipe, train=True) == Contrastive.text_columns(recipe, train=False) == columns


# --- held-out


def test_the_error_rate_is_over_the_clips_with_glosses() -> None:
    assert gloss_metrics([(["A"], ["A", "B"]), (["C"], [])]) == {"wer": 50.0}
    assert gloss_metrics([(["A"], [])]) == {}


def test_a_clip_of_the_layout() -> None:
    """The collate counts word tokens as the encoder does."""
    clips = pack_clips([[clip(5, "one", "A")]], SIZES)
    assert clips["layout"].word_lengths_B.tolist() == [ENCODER.config.word_count(5)]
