"""Visual language tuning: encoder and LLM frozen, a light MLP maps word tokens into the LLM's embedding space and
the model translates video to text; the loss counts answer tokens only (arXiv 2412.16524).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from pipeline import dist
from pipeline.evaluate.metrics import score
from pipeline.inference.clips import CollatePrompts, FetchFrames
from pipeline.inference.generate import GenerationOptions, translate_batch
from pipeline.inference.load import VIDEO_FORM
from pipeline.losses import label_chunks
from pipeline.models.pretrained import check_positions, position_limit
from pipeline.models.registry import build_llava_slt
from pipeline.stages.base import (
    ExportPlan,
    LossParts,
    MicroBatch,
    Normaliser,
    SummedStage,
    frozen_names,
    probe_frames,
    to_device,
)
from pipeline.stages.batches import TranslationCollate, check_features
from shards.order.options import PlanOptions, kept_frames
from shards.order.plan import Plan


class ConnectorStage(SummedStage):
    """Stage 3."""

    name: ClassVar[str] = "connector"
    best_metric: ClassVar[tuple[str, Literal["min", "max"]] | None] = ("eval/bleu4", "max")
    headline: ClassVar[tuple[str, ...]] = ("eval/bleu4", "eval/rouge_l")

    def build(self) -> nn.Module:
        model = self.recipe.model
        llava, self.processor = build_llava_slt(model, self.recipe.data, self.recipe.connector.prompt, self.dtype)
        self._check_positions(llava.llm)
        llava.generation_config = self._generation().config(llava.generation_config.eos_token_id, self.processor.pad_id)
        if model.gradient_checkpointing:
            llava.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.loss_chunk_tokens = llava.config.loss_chunk_tokens
        return llava

    def _check_positions(self, llm: Any) -> None:
        """Prompt, word tokens of the longest clip and answer must fit the LLM."""
        data, config = self.recipe.data, self.recipe.connector
        prompt = len(self.processor.prompt_ids(data.max_frames))
        check_positions(
            llm, prompt + config.max_new_tokens,
            f"connector.prompt with data.max_frames={data.max_frames} ({prompt} tokens) and"
            f" connector.max_new_tokens={config.max_new_tokens}", "model.llm",
            "lower data.max_frames or connector.max_new_tokens",
        )  # fmt: skip

    def _generation(self) -> GenerationOptions:
        config = self.recipe.connector
        return GenerationOptions(num_beams=config.num_beams, max_new_tokens=config.max_new_tokens)

    def freeze_plan(self) -> dict[str, bool]:
        return {"visual": False, "connector": True, "llm": False}

    def plan_options(self, train: bool) -> PlanOptions:
        data = self.recipe.data
        return PlanOptions(
            seed=self.recipe.seed,
            kind="group" if data.frame_budget and train else "clip",
            frame_budget=data.frame_budget,
            length_window=data.length_window if train else 0,
            epoch_samples=data.epoch_samples if train else 0,
            shuffle=train,
            max_frames=data.max_frames,
            frame_stride=data.frame_stride,
        )

    def attach(self, module: Any) -> None:
        self.module = module

    def check_data(self, plan: Plan) -> None:
        check_features(plan, self.module.visual)

    def prepare(self, plans: list[Plan]) -> None:
        self._check_answers(plans[0])
        super().prepare(plans)

    def _check_answers(self, plan: Plan) -> None:
        """Answers of the training data are not cut: where the LLM has a table of positions each must fit behind the
        prompt of its clip. Raises RecipeError naming the longest."""
        llm, data = self.module.llm, self.recipe.data
        if position_limit(llm) is None:
            return
        kept = kept_frames(plan.samples.column("frames").to_numpy(), data.max_frames, data.frame_stride)
        lengths = [
            len(self.processor.prompt_ids(int(frames))) + len(self.processor.answer_ids(text))
            for frames, text in zip(kept, plan.samples.column("text").to_pylist(), strict=True)
        ]
        longest = lengths.index(max(lengths))
        row = plan.samples.row(longest)
        check_positions(
            llm, lengths[longest],
            f"{row.corpus}/{row.sample_id}: the prompt and the text of this training sample"
            f" ({len(self.processor.answer_ids(row.text))} tokens with eos)", "model.llm",
            "take an LLM with more positions, lower data.max_frames, or build the shards without such long texts",
        )  # fmt: skip

    def text_model(self) -> str | None:
        return self.recipe.model.llm.path if self.recipe.model.llm is not None else None

    def fetch(self) -> Callable[..., Any]:
        data = self.recipe.data
        return FetchFrames(data.max_frames, data.frame_stride, data.image_pixels)

    def collate(self) -> Callable[..., MicroBatch]:
        return TranslationCollate(self.processor)

    def loss(self, model: Callable[..., Any], batch: MicroBatch, normaliser: Normaliser) -> LossParts:
        output = self._forward(model, batch)
        return LossParts(
            normaliser.scale(output.loss_sum),
            {"loss": output.loss_sum.detach(), "valid_tokens": output.valid_tokens.float()},
        )

    def _forward(self, model: Callable[..., Any], batch: MicroBatch) -> Any:
        labels = batch["labels"]
        chunks = label_chunks(labels, self.loss_chunk_tokens)
        if self.zero_stage == 3:  # every call of the head is a collective there: all ranks call it equally often
            chunks = int(dist.all_reduce_max(torch.tensor(chunks, device=self.device)))
        return model(
            min_chunks=chunks,
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            frames=batch["frames_NHWC"],
            frame_lengths=batch["frame_lengths_B"],
        )

    def reduce(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / max(sums["valid_tokens"], 1), "tokens": sums["valid_tokens"]}

    def evaluate(self, model: Callable[..., Any], module: Any) -> dict[str, float]:
        """Dev BLEU and ROUGE of real generation, scored once over all ranks' samples keyed by sample."""
        config = self.recipe.connector
        if not self.recipe.data.eval:
            return {}
        loader = self.held_out(self.recipe.data.eval, CollatePrompts(self.processor), config.eval_samples)
        options = replace(self._generation(), synced=self.world_size > 1 and self.zero_stage == 3)
        found: dict[int, tuple[str, str]] = {}
        module.eval()
        for batch, samples in self.held_out_batches(loader):
            texts = translate_batch(module, self.processor, to_device(batch, self.device), options)
            for at, sample in enumerate(samples):
                found[sample] = (texts[at], batch["rows"][at].text)
        merged = {key: value for part in dist.gather_objects(found) for key, value in part.items()}
        hypotheses = [merged[key][0] for key in sorted(merged)]
        references = [merged[key][1] for key in sorted(merged)]
        scores = score(hypotheses, references, config.score_protocol)
        return {"eval/bleu4": scores.bleu4, "eval/rouge_l": scores.rouge_l, "eval/samples": float(len(merged))}

    def probe(self, model: Callable[..., Any]) -> dict[str, torch.Tensor]:
        frames_NHWC, lengths_B = probe_frames(self.recipe.data.image_pixels, self.device)
        tokens = self.processor(frame_lengths=lengths_B.tolist(), texts=["a b", "c"])
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            output = model(frames=frames_NHWC, frame_lengths=lengths_B, **inputs)
        return {
            "frames": frames_NHWC.cpu(),
            "frame_lengths": lengths_B.cpu(),
            **{name: value.cpu() for name, value in inputs.items()},
            "logits": output.logits.float().cpu(),
        }

    def write_export_files(self, module: Any, folder: Path) -> ExportPlan:
        module.config.save_pretrained(folder)
        if module.generation_config is not None:
            module.generation_config.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        # how the training shards store video: `slt translate` brings any other video into this form first
        stored = self.open_shards(self.recipe.data.train[0].shards).manifest.options
        if "video" in stored:
            (folder / VIDEO_FORM).write_text(json.dumps(stored["video"], indent=1), encoding="utf-8")
        tied = ["llm.lm_head.weight"] if getattr(module.llm.config, "tie_word_embeddings", False) else []
        return ExportPlan(prefix="", tied=tied, frozen=frozen_names(module))
