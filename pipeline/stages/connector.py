"""Visual language tuning: encoder and LLM frozen, a light MLP maps word tokens into the LLM's embedding space and
the model translates video to text; the loss counts answer tokens only (arXiv 2412.16524).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from pipeline.config.prompt_schema import text_columns as prompt_columns
from pipeline.config.schema import ConnectorStageConfig, Recipe, SourceConfig
from pipeline.evaluate.metrics import score
from pipeline.inference.clips import CollatePrompts
from pipeline.inference.cues import prepare_cues, with_cues
from pipeline.inference.generate import GenerationOptions, translate_batch, with_end
from pipeline.inference.load import VIDEO_FORM
from pipeline.inference.references import texts_of_sample
from pipeline.inference.rows import ROWS_FORM
from pipeline.models import attention, kernels
from pipeline.models.generation_attention import generation_key, switched
from pipeline.models.llava_slt import LlavaSltForConditionalGeneration
from pipeline.models.processing import LlavaSltProcessor
from pipeline.models.recompute import checkpoint_gradients, share_of
from pipeline.models.registry import build_llava_slt
from pipeline.models.streams import Inputs
from pipeline.stages.base import ExportCard, ExportPlan, LossParts, Normaliser, SummedStage
from pipeline.stages.batches import TranslationBatch, TranslationCollate
from pipeline.stages.connector_packing import count_answers, sequence_options
from pipeline.stages.connector_positions import check_answers, check_prompt
from pipeline.stages.data import Plans, StageContext, open_plan, open_set
from pipeline.stages.video import VideoStage, check_video, merge_over_ranks, probed_inputs
from shards.order.options import PlanOptions
from shards.order.plan import Plan


class ConnectorStage(VideoStage[TranslationBatch], SummedStage[TranslationBatch]):
    """Stage 3."""

    name = "connector"
    card = ExportCard(
        what="A sign language translation model: visual encoder, connector and language model.",
        pipeline_tag="video-text-to-text",
        load="from pipeline.models.llava_slt import LlavaSltForConditionalGeneration\n"
        "model = LlavaSltForConditionalGeneration.from_pretrained(FOLDER)\n"
        "# or: slt translate video.mp4 --model FOLDER",
    )
    best_metric = ("eval/bleu4", "max")
    headline = ("eval/bleu4", "eval/rouge_l")
    module: LlavaSltForConditionalGeneration

    def __init__(
        self,
        context: StageContext,
        module: LlavaSltForConditionalGeneration,
        processor: LlavaSltProcessor,
        attention_key: str = "sdpa",
    ) -> None:
        """``attention_key``: the LLM's attention where rows are padded, which those of training never are."""
        super().__init__(context, module)
        self.processor, self.attention_key = processor, attention_key

    @classmethod
    def plan_options(cls, recipe: Recipe, train: bool) -> PlanOptions:
        options, data = super().plan_options(recipe, train), recipe.data
        if train and data.pack_tokens:
            return sequence_options(options, recipe)
        return replace(options, kind="group" if train and data.frame_budget else "clip", frame_budget=data.frame_budget)

    @classmethod
    def text_columns(cls, recipe: Recipe, train: bool) -> tuple[str, ...]:
        shown = prompt_columns(recipe.connector.prompt, recipe.connector.prompts, train)
        held_out = () if train else recipe.data.references.scored
        return (*super().text_columns(recipe, train), *shown, *held_out)

    @classmethod
    def plan(cls, recipe: Recipe, sources: list[SourceConfig], train: bool) -> Plan:
        count = count_answers(recipe) if train and recipe.data.pack_tokens else None
        columns = cls.text_columns(recipe, train)
        return open_plan(recipe.data, sources, cls.plan_options(recipe, train), count, columns)

    @classmethod
    def build(cls, context: StageContext, plans: Plans) -> Self:
        recipe, model = context.recipe, context.recipe.model
        prompt, prompts = recipe.connector.prompt, recipe.connector.prompts
        llava, processor = build_llava_slt(
            model, recipe.data, prompt, context.dtype, attention.implementation("sdpa"), prompts
        )
        processor = prepare_cues(processor, plans.train, plans.held_out)
        backend = attention.choose_for(llava.llm, model.attention, context.device)
        llava.visual.choose_attention(model.attention, context.device)
        check_prompt(llava.llm, processor, recipe)
        ends = with_end(llava.generation_config.eos_token_id, processor.end_id)
        llava.generation_config = generation(recipe.connector).config(ends, processor.pad_id)
        checkpoint_gradients(llava, share_of(model))
        fused = kernels.choose(model.kernels, llava.llm, context.device)
        llava.token_loss.backend = fused.loss
        if fused.layers == "liger":
            kernels.fuse_layers(llava.llm)
        check_answers(llava.llm, processor, plans, recipe.data.references.train)
        stage = cls(context, llava, processor, generation_key(llava.llm, backend))
        if llava.visual.backbone.trains:
            llava.visual.config.backbone_fingerprint = ""  # of weights that change from now on
        # an encoder that trained its backbone takes stored features, too, now that it is frozen
        check_video(context, plans, llava.visual, model.llm.path if model.llm is not None else None)
        return stage

    def freeze_plan(self) -> dict[str, bool]:
        return {"visual": False, "connector": True, "llm": False}

    def fetch(self, train: bool) -> Callable[..., Any]:
        return with_cues(super().fetch(train), self.processor, train)

    def collate(self) -> TranslationCollate:
        return TranslationCollate(self.processor, self.module.config.visual_config.clip_sizes())

    def loss(self, model: Callable[..., Any], batch: TranslationBatch, normaliser: Normaliser) -> LossParts:
        output = model(
            input_ids=batch["input_ids"],
            frames=batch["frames_NHWC"],
            layout=batch["layout"],
            answers=batch["answers"],
        )
        valid_tokens = torch.full((), float(batch["valid_tokens"]), device=self.device)
        return LossParts(
            normaliser.scale(output.loss_sum), {"loss": output.loss_sum.detach(), "valid_tokens": valid_tokens}
        )

    def reduce(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / max(sums["valid_tokens"], 1), "tokens": sums["valid_tokens"]}

    def evaluate(self, model: Callable[..., Any], stop_requested: Callable[[], bool]) -> dict[str, float]:
        """Dev BLEU and ROUGE of real generation, scored once over all ranks' samples keyed by sample."""
        sources, config = self.recipe.data.eval, self.recipe.connector
        if not sources:
            return {}
        synced = self.context.world_size > 1 and self.context.zero_stage == 3
        options = replace(generation(config), synced=synced)
        references = self.held_out_references(sources)
        found: dict[int, tuple[str, list[str]]] = {}
        sizes = self.module.config.visual_config.clip_sizes()
        batches = self.held_out(sources, CollatePrompts(self.processor, sizes), stop_requested, config.eval_samples)
        with switched(self.module.llm, self.attention_key):
            for batch, samples in batches:
                texts = translate_batch(self.module, self.processor, batch, options)
                for sample, text, row in zip(samples, texts, batch["rows"], strict=False):  # padding has no samples
                    found[sample] = (text, references(sample, row.text))
        pairs = merge_over_ranks(found)
        scores = score([text for text, _ in pairs], [reference for _, reference in pairs], config.score_protocol)
        return {"eval/bleu4": scores.bleu4, "eval/rouge_l": scores.rouge_l, "eval/samples": float(len(pairs))}

    def held_out_references(self, sources: list[SourceConfig]) -> Callable[[int, str], list[str]]:
        """``references(sample, text)`` of these held-out sources: the sample's text, and those of text columns."""
        if not (columns := self.recipe.data.references.scored):
            return lambda sample, text: [text]
        samples = self.plan(self.recipe, sources, train=False).samples
        return lambda sample, text: texts_of_sample(samples, sample, text, columns)

    def outputs(
        self, model: Callable[..., Any], frames_NHWC: Inputs, lengths_B: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        tokens = self.processor(frame_lengths=lengths_B.tolist(), texts=["a b", "c"], cues=self.processor.stand_ins(2))
        ids_BL, mask_BL = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        with switched(self.module.llm, "sdpa"):  # flash kernels leave zeros at padding, where sdpa computes something
            output = model(frames=frames_NHWC, frame_lengths=lengths_B, input_ids=ids_BL, attention_mask=mask_BL)
        return {"input_ids": ids_BL, "attention_mask": mask_BL, "logits": output.logits.float()}

    def write_export_files(self, folder: Path) -> ExportPlan:
        self.module.config.save_pretrained(folder)
        if self.module.generation_config is not None:
            self.module.generation_config.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        # how the training shards store video: `slt translate` converts any other video to this form
        stored = open_set(self.recipe.data, self.recipe.data.train[0].shards).manifest.options
        if "video" in stored:
            (folder / VIDEO_FORM).write_text(json.dumps(stored["video"], indent=1), encoding="utf-8")
        if records := self._row_records(stored):
            (folder / ROWS_FORM).write_text(json.dumps(records, indent=1), encoding="utf-8")
        tied = ["llm.lm_head.weight"] if getattr(self.module.llm.config, "tie_word_embeddings", False) else []
        return self.export_plan(prefix="", tied=tied)

    def _row_records(self, stored: dict[str, Any]) -> dict[str, Any]:
        """What says how files of keypoints or features are read; ``stored``: options of the training shards."""
        config, source, records = self.visual.config, self.recipe.data.train[0], dict[str, Any]()
        if config.backbone_config is None:
            records["frames" if config.reads_frames else "pose"] = stored["features"]
        if source.pose is not None:
            records["pose"] = open_set(self.recipe.data, source.pose).manifest.options["features"]
        return records

    @classmethod
    def exported(cls, folder: Path, probe: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = LlavaSltForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        output = model(
            probe["input_ids"],
            attention_mask=probe["attention_mask"],
            frames=probed_inputs(probe),
            frame_lengths=probe["frame_lengths"],
        )
        return {"logits": output.logits}


def generation(config: ConnectorStageConfig) -> GenerationOptions:
    """How held-out texts are generated."""
    return GenerationOptions(num_beams=config.num_beams, max_new_tokens=config.max_new_tokens)
