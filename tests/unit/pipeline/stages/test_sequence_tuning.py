"""Sequence-level tuning: candidates as documents of one row, rewards of their texts, losses by the slow way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.config.schema import Recipe
from pipeline.config.transfer_schema import InitFromConfig
from pipeline.errors import RecipeError
from pipeline.evaluate.metrics import sentence_bleu, sentence_rouge_l
from pipeline.evaluate.protocols import get_protocol
from pipeline.inference.sample import Candidate
from pipeline.losses.sequence import minimum_risk, policy_gradient
from pipeline.models.lora import adapted_layers
from pipeline.stages import sequence_tuning
from pipeline.stages.base import Normaliser
from pipeline.stages.candidates import Group, table_of
from pipeline.stages.connector import ConnectorStage
from pipeline.stages.data import StageContext
from pipeline.stages.sequence_tuning import SequenceTuning, reward_of
from shards.format.index import ShardSet
from tests.unit.pipeline.models.tiny import bpe_tokenizer, shake
from tests.unit.pipeline.stages import test_connector
from tests.unit.pipeline.stages.test_connector import TEXTS, clips_of

shards = test_connector.shards


def stage_of(folder: Path, **settings: Any) -> SequenceTuning:
    recipe = tuning_recipe(folder, **settings)
    if not (folder / "start").exists():
        stage_3(folder)
    context = StageContext(recipe, 0, 1, torch.device("cpu"))
    stage = SequenceTuning.build(context, SequenceTuning.plans(recipe))
    shake(stage.module, 0.3)
    stage.module.train()
    return stage


def tuning_recipe(folder: Path, parts: Any = None, **settings: Any) -> Recipe:
    bpe_tokenizer(folder)
    content = test_connector.recipe_of(folder).model_dump()
    content |= {"stage": "sequence_tuning", "sequence_tuning": {"samples": 5, **settings}}
    content["connector"] |= {"max_new_tokens": 4}
    content["model"]["init_from"] = {"model": str(folder / "start")}
    content["train"]["parts"] = parts or {}
    return Recipe.model_validate(content)


def stage_3(folder: Path) -> ConnectorStage:
    """A stage of the tests of stage 3, exported to ``folder / "start"``."""
    context = StageContext(test_connector.recipe_of(folder), 0, 1, torch.device("cpu"))
    stage = ConnectorStage.build(context, ConnectorStage.plans(context.recipe))
    shake(stage.module.connector, 0.3)
    stage.write_export_files(folder / "start")
    save_file({n: p.data.clone() for n, p in stage.module.named_parameters()}, folder / "start" / "model.safetensors")
    return stage


def batches_of(stage: SequenceTuning, *sizes: int) -> list[Any]:
    """The samples of the plan in micro-batches of these sizes."""
    plan = SequenceTuning.plan(stage.recipe, stage.recipe.data.train, train=True)
    items = [clips_of(plan, item) for item in plan.epoch(0)]
    ends = np.cumsum(sizes)
    return [stage.collate()(items[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


OBJECTIVES = [
    {"objective": "minimum_risk", "sharpness": 0.4},
    {"objective": "minimum_risk", "include_reference": False, "cross_entropy_weight": 0.5},
    {"objective": "grpo", "temperature": 1.3, "clip": 0.1},
]


@pytest.mark.parametrize("settings", OBJECTIVES)
def test_loss_and_gradient_are_those_of_every_candidate_alone(
    settings: dict[str, Any], tmp_path: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed documents, shared word tokens and gradients made in the forward pass against a padded forward of one
    candidate at a time, its logits, and autograd."""
    monkeypatch.setattr(sequence_tuning, "reward_of", letters)  # what random weights say is worth nothing
    stage = stage_of(tmp_path, **settings)
    (batch,) = batches_of(stage, 3)
    stage.loss(stage.module, batch, Normaliser(3, 1, step=7)).loss.backward()
    found = {name: parameter.grad for name, parameter in stage.module.named_parameters() if parameter.requires_grad}
    assert set(found) == set(stage.trainable) and all(grad is not None and grad.any() for grad in found.values())
    loss = slow_loss(stage, batch, 7) / 3
    expected = torch.autograd.grad(loss, [stage.module.get_parameter(name) for name in found])
    for grad, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=2e-3, atol=2e-6)
    stage.module.zero_grad()
    again = stage.loss(stage.module, batch, Normaliser(3, 1, step=7))
    torch.testing.assert_close(again.loss.detach(), loss.detach(), rtol=1e-4, atol=1e-5)


def letters(text: str, reference: str, config: Any = None, protocol: Any = None) -> float:
    """Some worth of any text."""
    return sum(map(ord, text + reference)) % 17 / 17


def slow_loss(stage: SequenceTuning, batch: Any, step: int) -> torch.Tensor:
    config, llm = stage.recipe.sequence_tuning, stage.module.llm
    groups = stage._groups(batch, stage._samples(batch, step))
    clips = batch["frames_NHWC"].split(batch["frame_lengths_B"].tolist())
    log_probs = []
    llm.set_attn_implementation("sdpa")
    for frames_THWC, prompt, group in zip(clips, batch["prompts"], groups, strict=True):
        for ids in group.counts:
            answer = torch.tensor(ids)
            whole = torch.cat([torch.tensor(prompt), answer])[None]
            logits = stage.module(whole, frames=frames_THWC, frame_lengths=torch.tensor([len(frames_THWC)])).logits[0]
            scores = logits[len(prompt) - 1 : -1].log_softmax(-1)
            log_probs.append(scores.gather(1, answer[:, None])[:, 0])
    rewards = [
        {ids: letters(stage.processor.decode(torch.tensor([ids]))[0], row.text) for ids in group.counts}
        for row, group in zip(batch["rows"], groups, strict=True)
    ]
    candidates, log_probs_N = table_of(groups, rewards), torch.cat(log_probs)
    if config.objective == "grpo":
        return policy_gradient(log_probs_N, candidates, config.clip).sum()
    risk = minimum_risk(log_probs_N, candidates, config.sharpness, config.include_reference).sum()
    if not config.cross_entropy_weight:
        return risk
    numbers = [(clip, ids) for clip, group in enumerate(groups) for ids in group.counts]
    references = [
        -scores.mean() for (clip, ids), scores in zip(numbers, log_probs, strict=True) if ids == groups[clip].reference
    ]
    return risk + config.cross_entropy_weight * torch.stack(references).sum()


def test_the_step_is_the_same_however_it_is_cut(tmp_path: Path, shards: ShardSet) -> None:
    """Candidates belong to the sample and the step, and the loss is a sum over clips."""
    stage = stage_of(tmp_path)
    whole, parts = batches_of(stage, 6), batches_of(stage, 1, 3, 2)
    drawn = [group for batch in whole for group in stage._samples(batch, 3)]
    again = [group for batch in parts for group in stage._samples(batch, 3)]
    assert [[c.ids for c in group] for group in drawn] == [[c.ids for c in group] for group in again]
    assert len({c.ids for group in drawn for c in group}) > 6 * 2
    assert [c.ids for c in stage._samples(whole[0], 4)[0]] != [c.ids for c in drawn[0]]
    losses = [[stage.loss(stage.module, batch, Normaliser(6, 1, step=3)) for batch in cut] for cut in (whole, parts)]
    sums = [{name: sum(float(part.sums[name]) for part in cut) for name in cut[0].sums} for cut in losses]
    assert sums[1] == pytest.approx(sums[0], rel=1e-4, abs=1e-5)
    assert sums[0]["samples"] == 6 and stage.reduce(sums[0])["reward"] == pytest.approx(sums[0]["reward"] / 6)
    assert "samples" not in stage.reduce(sums[0])
    loss = torch.stack([part.loss for part in losses[1]]).sum()
    torch.testing.assert_close(loss, losses[0][0].loss, rtol=1e-4, atol=1e-5)


def test_a_frozen_backbone_runs_once_and_the_encoder_never_for_a_candidate(tmp_path: Path, shards: ShardSet) -> None:
    stage = stage_of(tmp_path)
    visual, seen = stage.module.visual, []
    visual.backbone.register_forward_hook(lambda module, inputs, output: seen.append(("backbone", len(inputs[0]))))
    visual.word_level.register_forward_hook(lambda module, inputs, output: seen.append(("words", len(inputs[0]))))
    (batch,) = batches_of(stage, 2)
    stage.loss(stage.module, batch, Normaliser(2, 1))
    frames = len(batch["frames_NHWC"])
    assert seen == [("backbone", frames), ("words", frames), ("words", frames)]
    assert stage.module.training and stage.module.llm.config._attn_implementation != "sdpa"


def test_a_sampling_that_fails_leaves_the_model_in_training(
    tmp_path: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(tmp_path)
    before = stage.module.llm.config._attn_implementation
    monkeypatch.setattr(type(stage.module.llm), "generate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stage.loss(stage.module, batches_of(stage, 2)[0], Normaliser(2, 1))
    assert stage.module.training and stage.module.llm.config._attn_implementation == before


def test_equal_candidates_are_computed_once() -> None:
    samples = [Candidate((4, 1), (-1.0, -2.0)), Candidate((5,), (-3.0,)), Candidate((4, 1), (-1.0, -2.0))]
    group = Group.of(samples, (6, 1))
    assert group.counts == {(4, 1): 2, (5,): 1, (6, 1): 0}
    rewards = [{ids: ids[0] / 10 for ids in group.counts}, {(5,): 1.5}]
    table = table_of([group, Group.of(samples[1:2], None)], rewards)
    assert table.mask_BKL.sum(2).tolist() == [[2, 1, 2], [1, 0, 0]]
    torch.testing.assert_close(table.rewards_BK, torch.tensor([[0.4, 0.5, 0.6], [1.5, 0, 0]]))
    assert table.is_reference_BK.tolist() == [[0, 0, 1], [0, 0, 0]] and table.counts_BK.tolist() == [
        [2, 1, 0],
        [1, 0, 0],
    ]
    assert table.sampled_N.tolist() == [-1, -2, -3, 0, 0, -3]
    assert Group.of(samples, (5,)).counts == {(4, 1): 2, (5,): 1}, "a reference that was sampled is one candidate"


def test_rewards_are_weighted_sums(tmp_path: Path, shards: ShardSet) -> None:
    protocol = get_protocol("default")
    bleu, rouge = (f("it rains", ["tomorrow it rains"], protocol) for f in (sentence_bleu, sentence_rouge_l))
    for weights in ((1.0, 0.0), (0.0, 2.0), (0.25, 0.5)):
        config = stage_of(tmp_path, bleu_weight=weights[0], rouge_l_weight=weights[1]).recipe.sequence_tuning
        found = reward_of("it rains", "tomorrow it rains", config, "default")
        assert found == pytest.approx((weights[0] * bleu + weights[1] * rouge) / 100)
        assert reward_of("tomorrow it rains", "tomorrow it rains", config, "default") == pytest.approx(sum(weights))


def test_an_export_repeats_the_live_model(tmp_path: Path, shards: ShardSet) -> None:
    stage, folder = stage_of(tmp_path), tmp_path / "export"
    probe = stage.probe(stage.module.eval())
    stage.write_export_files(folder)
    stage.module.save_pretrained(folder)
    torch.testing.assert_close(SequenceTuning.exported(folder, probe, torch.float32)["logits"], probe["logits"])
    assert len(TEXTS) == 6


def test_it_starts_where_stage_3_ended(tmp_path: Path, shards: ShardSet) -> None:
    recipe, before = tuning_recipe(tmp_path), stage_3(tmp_path)
    stage = SequenceTuning.build(StageContext(recipe, 0, 1, torch.device("cpu")), SequenceTuning.plans(recipe))
    for name, parameter in before.module.connector.named_parameters():
        assert torch.equal(stage.module.connector.get_parameter(name), parameter)
    assert stage.start is None, "nothing looks back at it"


def test_the_start_is_that_of_the_export_whatever_was_learned_since(tmp_path: Path, shards: ShardSet) -> None:
    """Connector and adapters of the LLM are left out of it; the divergence is that of the slow way."""
    stage = stage_of(tmp_path, parts={"llm": {"mode": "lora", "lora_rank": 2}}, kl_weight=0.3)
    connector, llm = stage.module.connector, stage.module.llm
    (batch,) = batches_of(stage, 2)
    with torch.no_grad():
        part = stage.loss(stage.module, batch, Normaliser(2, 1))
        assert float(part.sums["divergence"]) > 0
        for layer in adapted_layers(llm).values():
            layer.lora_B["default"].weight.zero_()
        connector.load_state_dict({n: p.clone() for n, p in stage.start.named_parameters()})  # type: ignore[union-attr]
        part = stage.loss(stage.module, batch, Normaliser(2, 1))
    assert float(part.sums["divergence"]) == pytest.approx(0, abs=1e-6)
    assert stage.module.connector is connector and stage.module.training
    assert {layer.alpha for layer in adapted_layers(llm).values()} == {16.0}


def test_what_else_trains_than_the_start_can_leave_out_is_refused(tmp_path: Path, shards: ShardSet) -> None:
    said = r"sequence_tuning.kl_weight: \d+ parameters train besides the connector, first visual.word_level"
    with pytest.raises(RecipeError, match=said):
        stage_of(tmp_path, parts={"visual.word": {"mode": "trained"}}, kl_weight=0.3)


def test_an_export_without_a_connector_is_no_start(tmp_path: Path, shards: ShardSet) -> None:
    recipe, before = tuning_recipe(tmp_path), stage_3(tmp_path)
    before.module.llm.save_pretrained(tmp_path / "llm")
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"init_from": InitFromConfig(model=str(tmp_path / "llm"))})}
    )
    with pytest.raises(RecipeError, match=r"model.init_from.model: .*llm holds no connector, and a new one writes"):
        SequenceTuning.build(StageContext(recipe, 0, 1, torch.device("cpu")), SequenceTuning.plans(recipe))
