"""Visual contrastive pretraining: align the hierarchical visual encoder with a frozen text encoder, at sentence
level (CLIP, arXiv 2103.00020) and at word level (CiCo, arXiv 2303.12793), so that word tokens become compatible
with token embeddings (arXiv 2412.16524).

Negatives are the whole global batch, whatever the number of ranks and micro-batches: local loss with
gather-with-grad, cached-gradient accumulation (GradCache, arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional

from pipeline import dist
from pipeline.config.inputs import too_few_texts
from pipeline.errors import RecipeError
from pipeline.inference.clips import FetchFrames
from pipeline.losses import Tokens, clamped_scale, sentence_contrastive, token_contrastive
from pipeline.models.contrastive import ContrastiveModel
from pipeline.models.registry import build_text_encoder, build_visual
from pipeline.models.text_cache import TextFeatureCache
from pipeline.stages.base import CachedStage, ExportPlan, LossParts, MicroBatch, frozen_names, probe_frames, to_device
from pipeline.stages.batches import ContrastiveCollate, check_features
from pipeline.stages.held_out_retrieval import SENTENCE, TOKEN, TRAINED, HeldOutPair, held_out_metrics, pairs_of
from shards.order.options import PlanOptions
from shards.order.plan import Plan


class Contrastive(CachedStage):
    """Stage 2."""

    name: ClassVar[str] = "contrastive"
    best_metric: ClassVar[tuple[str, Literal["min", "max"]] | None] = ("eval/video_to_text/r1", "max")
    headline: ClassVar[tuple[str, ...]] = (
        "eval/video_to_text/r1",
        "eval/text_to_video/r1",
        "eval/video_to_text/median_rank",
    )

    def build(self) -> nn.Module:
        model = self.recipe.model
        assert model.visual is not None and model.text_encoder is not None  # checked when the recipe was loaded
        self.text_encoder = build_text_encoder(model.text_encoder, self.device)
        visual = build_visual(model.visual, self.recipe.data.image_pixels, self.dtype)
        if model.gradient_checkpointing:
            visual.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return ContrastiveModel(visual, self.text_encoder.width, self.recipe.contrastive)

    def attach(self, module: Any) -> None:
        self.module = module

    def freeze_plan(self) -> dict[str, bool]:
        parts = ("visual", "sentence_head", "word_head", "text_sentence_head", "text_token_head")
        return {part: True for part in (*parts, "log_scale", "log_token_scale")}

    def plan_options(self, train: bool) -> PlanOptions:
        data = self.recipe.data
        return PlanOptions(
            seed=self.recipe.seed,
            kind="clip",
            length_window=data.length_window if train else 0,
            epoch_samples=data.epoch_samples if train else 0,
            unique_texts_window=self.recipe.train.global_batch if train and data.unique_texts else 0,
            shuffle=train,
            max_frames=data.max_frames,
            frame_stride=data.frame_stride,
        )

    def check_data(self, plan: Plan) -> None:
        check_features(plan, self.module.visual)
        # sets in object stores are looked at here for the first time, all others before the ranks start, too
        batch = plan.options.unique_texts_window
        if batch and (text := too_few_texts(batch, len(plan.samples.column("text_hash").unique()))):
            raise RecipeError(text)

    def text_model(self) -> str | None:
        return self.recipe.model.text_encoder.path if self.recipe.model.text_encoder is not None else None

    def fetch(self) -> Callable[..., Any]:
        data = self.recipe.data
        return FetchFrames(data.max_frames, data.frame_stride, data.image_pixels)

    def collate(self) -> Callable[..., MicroBatch]:
        return ContrastiveCollate()

    def prepare(self, plans: list[Plan]) -> None:
        """Encode every distinct text once, each rank its share; then the text encoder is dropped."""
        super().prepare(plans)
        texts = sorted({text for plan in plans for text in plan.samples.column("text").unique().to_pylist()})
        self.cache = TextFeatureCache(Path(self.recipe.run_dir) / "text_features")
        self.cache.build(texts, self.text_encoder, self.rank, self.world_size, dist.barrier)
        del self.text_encoder  # a large model nobody needs any more
        self.module.set_text_statistics(self.cache.statistics())

    def features(self, model: Callable[..., Any], batch: MicroBatch) -> dict[str, torch.Tensor]:
        text_BD, tokens_BLD, mask_BL = self.cache.lookup(batch["text_ids_B"].tolist())
        features = model(
            batch["frames_NHWC"], batch["frame_lengths_B"], text_BD.to(self.device), tokens_BLD.to(self.device)
        )
        return {**features, "tokens_mask_BL": mask_BL.to(self.device)}

    def contrast(self, features: list[dict[str, torch.Tensor]], batches: list[MicroBatch]) -> LossParts:
        config = self.recipe.contrastive
        scale = clamped_scale(features[0]["log_scale"].float(), config.max_logit_scale)
        token_scale = clamped_scale(features[0]["log_token_scale"].float(), config.max_logit_scale)
        text_ids_B = torch.cat([batch["text_ids_B"] for batch in batches])
        total = torch.zeros((), device=self.device)
        sums = {"samples": torch.tensor(float(len(text_ids_B)), device=self.device)}
        count = len(text_ids_B)
        if SENTENCE in TRAINED[config.objective]:
            video_BE, text_BE = (torch.cat([f[name].float() for f in features]) for name in ("video_BE", "text_BE"))
            sentence = sentence_contrastive(
                video_BE, text_BE, text_ids_B, scale, dist.gather, rank=self.rank, row_chunk=config.row_chunk
            )
            total = total + sentence
            sums["sentence_loss"] = sentence.detach() * count
        if TOKEN in TRAINED[config.objective]:
            words, tokens = self._padded(features)
            token = token_contrastive(
                words, tokens, text_ids_B, (scale, token_scale), dist.gather,
                rank=self.rank, row_chunk=config.row_chunk,
            )  # fmt: skip
            total = total + token * (config.token_weight if config.objective == "both" else 1.0)
            sums["token_loss"] = token.detach() * count
        sums["loss"] = total.detach() * count
        sums["logit_scale"] = scale.detach().sum() * count
        return LossParts(total, sums)

    def _padded(self, features: list[dict[str, torch.Tensor]]) -> tuple[Tokens, Tokens]:
        """Word and text tokens of all micro-batches, padded to the longest of all ranks (gathering needs it)."""
        sizes = torch.tensor(
            [max(f["words_BSE"].shape[1] for f in features), max(f["tokens_BLE"].shape[1] for f in features)],
            device=self.device,
        )
        longest_S, longest_L = dist.all_reduce_max(sizes).tolist()

        def join(values: str, mask: str, length: int) -> Tokens:
            return Tokens(
                torch.cat(
                    [functional.pad(f[values].float(), (0, 0, 0, length - f[values].shape[1])) for f in features]
                ),
                torch.cat([functional.pad(f[mask], (0, length - f[mask].shape[1])) for f in features]),
            )

        return join("words_BSE", "words_mask_BS", longest_S), join("tokens_BLE", "tokens_mask_BL", longest_L)

    def reduce(self, sums: dict[str, float]) -> dict[str, float]:
        samples = max(sums["samples"], 1)
        names = ("loss", "sentence_loss", "token_loss", "logit_scale")
        return {name: sums[name] / samples for name in names if name in sums}

    def evaluate(self, model: Callable[..., Any], module: Any) -> dict[str, float]:
        """Retrieval on the held-out sources in both directions, by what the objective trains (`held_out_metrics`)."""
        data, config = self.recipe.data, self.recipe.contrastive
        if not data.eval:
            return {}
        found: dict[int, HeldOutPair] = {}
        token_scale = 0.0
        with torch.no_grad():
            for batch, samples in self.held_out_batches(self.held_out(data.eval)):
                features = self.features(model, to_device(batch, self.device))
                token_scale = float(clamped_scale(features["log_token_scale"].float(), config.max_logit_scale))
                pairs = pairs_of(features, batch["text_ids_B"], config)
                found.update(zip(samples, pairs[: len(samples)], strict=True))  # a padding batch stands for no sample
            merged = {key: value for part in dist.gather_objects(found) for key, value in part.items()}
            metrics = held_out_metrics([merged[key] for key in sorted(merged)], config, token_scale, self.device)
        # every rank must find the same checkpoint the best one, also where devices round differently
        metrics = dist.broadcast_object(metrics)
        return {f"eval/{name}": value for name, value in metrics.items()}

    def probe(self, model: Callable[..., Any]) -> dict[str, torch.Tensor]:
        frames_NHWC, lengths_B = probe_frames(self.recipe.data.image_pixels, self.device)
        text_BD, tokens_BLD, _ = self.cache.lookup(self.cache.hashes()[:2])
        with torch.no_grad():
            features = model(frames_NHWC, lengths_B, text_BD.to(self.device), tokens_BLD.to(self.device))
        names = ("video_BE", "words_BSE", "words_mask_BS")
        return {
            "frames": frames_NHWC.cpu(),
            "frame_lengths": lengths_B.cpu(),
            **{name: features[name].float().cpu() for name in names},
        }

    def write_export_files(self, module: Any, folder: Path) -> ExportPlan:
        module.visual.config.save_pretrained(folder)
        return ExportPlan(prefix="visual.", tied=[], frozen=frozen_names(module))
