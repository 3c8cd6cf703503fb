"""Stage 3 with cues in its prompt: items, rows and evaluations; cue dropout for any worker count and after resume."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.prompt_schema import PromptsConfig
from pipeline.config.schema import Recipe
from pipeline.inference.clips import CollatePrompts
from pipeline.inference.cues import CueReader, FetchPrompted, check_cues, example_pool
from pipeline.models.processing import ProcessorOptions
from pipeline.stages.connector import ConnectorStage
from pipeline.stages.data import StageContext
from shards.errors import DataError
from shards.format.index import fingerprint as fingerprint_of
from shards.format.index import read_index, rows_to_table, write_index
from shards.format.text_columns import write_column
from shards.load.draws import Draw, Purpose
from shards.load.loader import EvalLoader, StepLoader
from shards.load.reader import Reader, SampleReader
from shards.load.requests import LoaderOptions
from shards.order.items import Elements
from shards.order.options import PlanOptions, Source
from shards.order.plan import Plan
from shards.schema import text_hash
from tests.unit.pipeline.models.tiny import PIXELS, bpe_tokenizer, model_config
from tests.unit.shards.shard_sets import collate_lists, write_videos

PROMPT = "to {language} after {previous} like {example} signs {gloss} {video} text:"
PROMPTS = {
    "languages": {"de": "German", "en": "English"},
    "previous": {"count": 2, "dropout": 0.5, "empty": "nothing at all was said"},
    "gloss": {"dropout": 0.3, "empty": ""},
    "example": {"count": 1, "pool": 3},
}
FRAMES = [16, 9, 12, 5, 30, 8]
TEXTS = ["tomorrow it rains", "here", "I am here in the north", "it rains", "I am", "north"]
PREVIOUS = [[], [TEXTS[0]], TEXTS[:2], ["a b", "c d", "e f"], [], [TEXTS[4]]]
GLOSSES = [["RAIN TOMORROW"], ["HERE"], ["NORTH"], ["RAIN"], ["I"], ["NORTH"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Clips without bytes of videos, in two languages, with their text columns."""
    folder = write_videos(tmp_path / "set", [b"x"] * 6, FRAMES)
    shard_set = read_index(folder)
    languages = ["de", "en"] * 3
    rows = [
        row._replace(text=text, text_hash=text_hash(text), language=language, sign_language="gsg")
        for row, text, language in zip(shard_set.rows(), TEXTS, languages, strict=True)
    ]
    table = rows_to_table(rows)
    shard_set.manifest.fingerprint = fingerprint_of(shard_set.manifest.shards, table)
    write_index(folder, table, shard_set.manifest)
    write_column(read_index(folder), "previous", PREVIOUS, {})
    write_column(read_index(folder), "pseudo_gloss", GLOSSES, {})
    return folder


def recipe_of(tokenizer: Path, folder: Path, prompts: Mapping[str, Any] = PROMPTS, **data: Any) -> Recipe:
    source = [{"shards": str(folder)}]
    return Recipe.model_validate(
        {
            "name": "x", "stage": "connector", "run_dir": "x", "model": model_config(tokenizer).model_dump(),
            "data": {"train": source, "eval": source, "max_frames": 64, "image_pixels": PIXELS, **data},
            "connector": {"prompt": PROMPT, "prompts": prompts, "max_new_tokens": 3},
            "train": {"global_batch": 2, "micro_batch": 1, "precision": "fp32", "optimizer": {"lr": 1e-3}},
        }
    )  # fmt: skip


def plan_of(folder: Path, *columns: str) -> Plan:
    return Plan(
        [Source(read_index(folder), columns=columns or ("previous", "pseudo_gloss"))], PlanOptions("clip", seed=5)
    )


def options_of(plan: Plan, prompt: str = PROMPT, **changes: Any) -> ProcessorOptions:
    prompts = PromptsConfig(**{**PROMPTS, **changes})
    return ProcessorOptions(prompt, prompts=prompts, examples=example_pool(plan.samples, prompt, prompts, 5))


def fetch_sample(reader: SampleReader, item: Elements) -> list[int]:
    """In place of clips."""
    return [int(sample) for sample in item["sample"]]


def fetch_frames(reader: SampleReader, item: Elements) -> list[tuple[np.ndarray, Any]]:
    """Clips that no video holds."""
    frames = reader.plan.samples.columns["frames"]
    return [(np.zeros((frames[n], PIXELS, PIXELS, 3), np.uint8), reader.row(n)) for n in item["sample"].tolist()]


def read(plan: Plan, fetch: Any, steps: int, workers: int = 0, state: Any = None) -> tuple[list[Any], Any]:
    loader = StepLoader(plan, fetch, collate_lists, LoaderOptions(0, 1, 3, 3, workers=workers))
    if state is not None:
        loader.load_state_dict(state)
    stream = iter(loader)
    batches = [next(stream) for _ in range(steps)]
    items = [raw for step in batches for batch in step.micro_batches for item in batch["items"] for raw in item]
    return items, loader.state_dict()


def test_cues_are_the_same_for_any_worker_count_and_after_resume(folder: Path) -> None:
    plan = plan_of(folder)
    fetch = FetchPrompted(fetch_sample, CueReader(options_of(plan)), train=True)
    whole, _ = read(plan, fetch, steps=8)
    assert read(plan, fetch, steps=8, workers=2)[0] == whole
    first, state = read(plan, fetch, steps=3)
    assert first + read(plan_of(folder), fetch, steps=5, state=state)[0] == whole
    shown = {
        sample: {(cues["previous"], cues["gloss"], cues["example"]) for s, cues in whole if s == sample}
        for sample, _ in whole
    }
    assert any(len(kinds) > 1 for kinds in shown.values()), "another showing draws anew"
    said = {cues["previous"] for sample, cues in whole if sample == 3}
    assert said <= {"c d e f", PROMPTS["previous"]["empty"]}  # type: ignore[index]


def test_an_evaluation_draws_nothing_and_shows_no_gloss(folder: Path) -> None:
    plan = plan_of(folder)
    fetch = FetchPrompted(fetch_sample, CueReader(options_of(plan)))
    loader = EvalLoader(plan, fetch, collate_lists, rank=0, world_size=1, micro_batch=6)
    (batch,) = [batch for batch, _ in loader.padded()]
    cues = {sample: cues for item in batch["items"] for sample, cues in item}
    assert cues[3]["previous"] == "c d e f" and cues[0]["previous"] == "nothing at all was said"
    assert [cues[n]["language"] for n in range(2)] == ["German", "English"]
    assert {of["gloss"] for of in cues.values()} == {""}
    shown = options_of(plan, gloss={"held_out": "source"})
    row, samples = plan.samples.row(1), plan.samples
    assert CueReader(shown).cues(samples, 1, row, None)["gloss"] == "HERE"
    annotated = options_of(plan, "{gloss} {video}", gloss={"held_out": "source", "source": "annotation"})
    assert CueReader(annotated).cues(samples, 1, row._replace(gloss="IX-1"), None) == {"gloss": "IX-1"}


def test_no_example_is_the_text_itself(folder: Path) -> None:
    plan = plan_of(folder)
    options = options_of(plan, example={"pool": 6, "count": 5, "template": "{gloss}: {text}"})
    assert {text for _, text in options.examples} == set(TEXTS) and ("HERE: here", "here") in options.examples
    for showing in (None, 0, 1, 2):
        draw = None if showing is None else Draw(Purpose.CUES, 5, 1, showing)
        others = CueReader(options).examples("Here ", draw)
        assert sorted(others) == sorted(shown for shown, text in options.examples if text != "here")
    assert example_pool(plan.samples, "{video}", PromptsConfig(), 5) == ()
    assert options_of(plan).examples == options_of(plan_of(folder)).examples and len(options_of(plan).examples) == 3


def test_packed_items_are_never_longer_than_planned_and_equal_without_dropout(folder: Path, tmp_path: Path) -> None:
    bpe_tokenizer(tmp_path)
    still = {name: {k: v for k, v in of.items() if k != "dropout"} for name, of in PROMPTS.items()}
    for prompts in (PROMPTS, {**still, "example": {"pool": 1, "empty": ""}}):
        recipe = recipe_of(tmp_path, folder, prompts, pack_tokens=200)
        context = StageContext(recipe, 0, 1, torch.device("cpu"))
        plans = ConnectorStage.plans(recipe)
        stage = ConnectorStage.build(context, plans)
        fetch = FetchPrompted(fetch_frames, CueReader(stage.processor.options), train=True)
        loader = StepLoader(plans.train, fetch, stage.collate(), LoaderOptions(0, 1, 1, 1))
        planned = {n: length for n, _, length in plans.train.epoch(0).elements.tolist()}
        lengths = []
        for step, _ in zip(loader, range(6), strict=False):
            for batch in step.micro_batches:
                samples = [int(row.sample_id[-1]) for row in batch["rows"]]
                found = batch["answers"]["packed"]["documents"].borders.diff().tolist()
                lengths += [(found[k], planned[n]) for k, n in enumerate(samples)]
        assert all(found <= most for found, most in lengths) and any(found == most for found, most in lengths)
        if prompts is not PROMPTS:
            others = [pair for pair in lengths if pair[0] != pair[1]]
            assert {most - found for found, most in others} <= {0}, "nothing is left out: exact"
        assert stage.processor.options.examples and plans.train.options.prompt_tokens == 0


def test_the_identity_of_packed_items_knows_the_prompt(folder: Path, tmp_path: Path) -> None:
    bpe_tokenizer(tmp_path)
    plans = [
        ConnectorStage.plan(recipe, recipe.data.train, train=True)
        for recipe in (
            recipe_of(tmp_path, folder, pack_tokens=200),
            recipe_of(
                tmp_path,
                folder,
                {**PROMPTS, "system": "", "languages": {"de": "Deutsch", "en": "Englisch"}},
                pack_tokens=200,
            ),
        )
    ]
    assert plans[0].fingerprint != plans[1].fingerprint and "+previous:" in plans[0].identity["sources"][0]
    held_out = ConnectorStage.text_columns(recipe_of(tmp_path, folder), train=False)
    assert held_out == ("previous",), "evaluations show no gloss, and so need none"


def test_an_export_knows_the_examples_and_an_evaluation_of_it_shows_the_same(folder: Path, tmp_path: Path) -> None:
    bpe_tokenizer(tmp_path)
    context = StageContext(recipe_of(tmp_path, folder), 0, 1, torch.device("cpu"))
    stage = ConnectorStage.build(context, ConnectorStage.plans(context.recipe))
    stage.processor.save_pretrained(tmp_path / "export")
    loaded = type(stage.processor).from_pretrained(tmp_path / "export")
    assert loaded.options == stage.processor.options and len(loaded.options.examples) == 3
    reader, collates = Reader(plan_of(folder)), []
    for processor in (stage.processor, loaded):
        fetch = FetchPrompted(fetch_frames, CueReader(processor.options))
        items = [fetch(reader, item) for item in reader.plan.epoch(0)]
        collates.append(CollatePrompts(processor, stage.module.config.visual_config.clip_sizes())(items))
    assert torch.equal(collates[0]["input_ids"], collates[1]["input_ids"])


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ("{previous} {video}", {"previous": {}}, r"clip0000\): connector.prompt shows \{previous\}, but there is none"),
        ("{language} {video}", {"languages": {"de": "D"}}, r"clip0001\): the language 'en' has no name"),
        ("{gloss} {video}", {"gloss": {"held_out": "source", "source": "annotation"}}, r"shows \{gloss\}, but there"),
        ("{example} {video}", {"example": {"pool": 1}}, r"shows \{example\}, but there is none"),
    ],
)
def test_a_sample_that_lacks_a_cue_is_named_before_training(
    folder: Path, prompt: str, changes: dict[str, Any], message: str
) -> None:
    plan = plan_of(folder)
    options = options_of(plan, prompt, **changes)
    if "example" in prompt:
        options = ProcessorOptions(prompt, prompts=options.prompts)
    for train in (True, False):
        with pytest.raises(DataError, match=message):
            check_cues(plan, CueReader(options), train)


def test_a_set_without_the_column_is_refused(folder: Path, tmp_path: Path) -> None:
    bpe_tokenizer(tmp_path)
    (folder / "column-previous.arrow").unlink()
    recipe = recipe_of(tmp_path, folder)
    with pytest.raises(DataError, match=r"no text column 'previous'\n  fix: there is pseudo_gloss; make it with"):
        ConnectorStage.plan(recipe, recipe.data.train, train=True)
