"""Visual contrastive pretraining: align the hierarchical visual encoder with a frozen text encoder, at sentence
level (CLIP, arXiv 2103.00020) and at word level (CiCo, arXiv 2303.12793), so that word tokens become compatible
with token embeddings (arXiv 2412.16524).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import torch
from safetensors.torch import load_file

from pipeline import dist
from pipeline.config.inputs import too_few_texts
from pipeline.config.schema import Recipe
from pipeline.errors import RecipeError
from pipeline.losses import clamped_scale
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.contrastive import ContrastiveModel
from pipeline.models.recompute import checkpoint_gradients, share_of
from pipeline.models.registry import build_text_encoder, build_visual
from pipeline.models.text_cache import TextFeatureCache
from pipeline.models.visual import HierarchicalVisualEncoder
from pipeline.stages.base import CachedStage, ExportCard, ExportPlan, LossParts, Normaliser
from pipeline.stages.batches import ContrastiveBatch, ContrastiveCollate
from pipeline.stages.contrastive_loss import contrastive_loss, tile_mib
from pipeline.stages.data import Plans, StageContext
from pipeline.stages.held_out_retrieval import HeldOutPair, held_out_metrics, pairs_of
from pipeline.stages.video import VideoStage, check_video, merge_over_ranks
from shards.order.options import PlanOptions
from shards.order.plan import Plan

log = logging.getLogger(__name__)


class Contrastive(VideoStage[ContrastiveBatch], CachedStage[ContrastiveBatch]):
    """Stage 2."""

    name = "contrastive"
    card = ExportCard(
        what="A hierarchical visual encoder (frames, word tokens, sentence) aligned with a text encoder.",
        pipeline_tag="feature-extraction",
        load="from pipeline.models.visual import HierarchicalVisualEncoder\n"
        "encoder = HierarchicalVisualEncoder.from_pretrained(FOLDER)",
    )
    best_metric = ("eval/video_to_text/r1", "max")
    headline = (
        "eval/video_to_text/r1",
        "eval/text_to_video/r1",
        "eval/video_to_text/median_rank",
    )
    module: ContrastiveModel

    def __init__(self, context: StageContext, module: ContrastiveModel, texts: TextFeatureCache) -> None:
        super().__init__(context, module)
        self.texts = texts

    @classmethod
    def plan_options(cls, recipe: Recipe, train: bool) -> PlanOptions:
        window = recipe.train.global_batch if train and recipe.data.unique_texts else 0
        return replace(super().plan_options(recipe, train), unique_texts_window=window)

    @classmethod
    def build(cls, context: StageContext, plans: Plans) -> Self:
        """Encodes every distinct text once, each rank its share; does not keep the text encoder."""
        recipe, model = context.recipe, context.recipe.model
        assert model.visual is not None and model.text_encoder is not None  # checked when the recipe was loaded
        encoder = build_text_encoder(model.text_encoder, context.device)
        visual = build_visual(model.visual, recipe.data.image_pixels, context.dtype)
        visual.choose_attention(model.attention, context.device)
        checkpoint_gradients(visual, share_of(model))
        module = ContrastiveModel(visual, encoder.width, recipe.contrastive)
        check_texts(plans.train)
        check_video(context, plans, visual, model.text_encoder.path)
        cache = TextFeatureCache(Path(recipe.run_dir) / "text_features")
        cache.build(texts_of(plans), encoder, context.rank, context.world_size, dist.barrier)
        module.set_text_statistics(cache.statistics())
        log.info("contrastive loss: tiles of %d MiB", tile_mib(recipe.contrastive, context.device))
        return cls(context, module, cache)

    def freeze_plan(self) -> dict[str, bool]:
        towers = ("visual", "sentence_head", "word_head", "text_sentence_head", "text_token_head")
        return {part: True for part in (*towers, "log_scale", "log_token_scale", "sentence_bias")}

    def collate(self) -> ContrastiveCollate:
        return ContrastiveCollate(self.module.visual.config.clip_sizes(), self.texts)

    def features(self, model: Callable[..., Any], batch: ContrastiveBatch) -> dict[str, torch.Tensor]:
        features: dict[str, torch.Tensor] = model(
            batch["frames_NHWC"], None, batch["text_BD"], batch["tokens_ND"], batch["layout"]
        )
        return features

    def for_replay(self, batch: ContrastiveBatch, features: dict[str, torch.Tensor]) -> ContrastiveBatch:
        """A frozen backbone runs once: its features, a hundredth of the images' size, take their place."""
        pooled_NP = features.pop("pooled_NP", None)
        return batch if pooled_NP is None else {**batch, "frames_NHWC": pooled_NP}

    def contrast(
        self, features: list[dict[str, torch.Tensor]], batches: list[ContrastiveBatch], normaliser: Normaliser
    ) -> LossParts:
        return contrastive_loss(features, batches, self.recipe.contrastive, normaliser)

    def reduce(self, sums: dict[str, float]) -> dict[str, float]:
        samples = max(sums["samples"], 1)
        names = ("loss", "sentence_loss", "token_loss", "logit_scale")
        return {name: sums[name] / samples for name in names if name in sums}

    def evaluate(self, model: Callable[..., Any], stop_requested: Callable[[], bool]) -> dict[str, float]:
        """Retrieval on the held-out sources in both directions, by what the objective trains (`held_out_metrics`)."""
        sources, config = self.recipe.data.eval, self.recipe.contrastive
        if not sources:
            return {}
        pair_of_sample: dict[int, HeldOutPair] = {}
        token_scale = 0.0
        with torch.no_grad():
            for batch, samples in self.held_out(sources, self.collate(), stop_requested):
                features = self.features(model, batch)
                token_scale = float(clamped_scale(features["log_token_scale"].float(), config.max_logit_scale))
                pairs = pairs_of(features, batch, config)
                pair_of_sample.update(zip(samples, pairs[: len(samples)], strict=True))  # padding has no samples
            metrics = held_out_metrics(merge_over_ranks(pair_of_sample), config, token_scale, self.device)
        # all ranks must agree on the best checkpoint, even if devices round differently
        return {f"eval/{name}": value for name, value in dist.broadcast_object(metrics).items()}

    def outputs(
        self, model: Callable[..., Any], frames_NHWC: torch.Tensor, lengths_B: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        texts = self.texts.lookup(self.texts.first(2))
        layout = ClipLayout.of(lengths_B.tolist(), self.module.visual.config.clip_sizes()).to(self.device)
        text = (texts.text_BD.to(self.device), texts.tokens_ND.to(self.device))
        features = model(frames_NHWC, None, *text, layout)
        words_BSE, mask_BS = layout.pad_words(features["words_ME"])
        outputs = {"video_BE": features["video_BE"], "words_BSE": words_BSE, "words_mask_BS": mask_BS}
        return {name: value.float() for name, value in outputs.items()}

    def write_export_files(self, folder: Path) -> ExportPlan:
        visual = self.module.visual
        if visual.backbone.trains:  # of an encoder that was loaded: features of its old backbone are another's now
            visual.config.backbone_fingerprint = ""
        visual.config.save_pretrained(folder)
        return self.export_plan(prefix="visual.", tied=[])

    @classmethod
    def exported(cls, folder: Path, probe: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = HierarchicalVisualEncoder.from_pretrained(folder, dtype=dtype).eval()
        output, heads = model(probe["frames"], probe["frame_lengths"]), load_file(folder / "heads.safetensors")
        return {
            "video_BE": output.sentence_BD @ heads["sentence_head.weight"].T,
            "words_BSE": output.layout.pad_words(output.words_MD)[0] @ heads["word_head.weight"].T,
        }


def texts_of(plans: Plans) -> pa.Table:
    """``text`` and ``text_hash`` of every sample."""
    names = ("text", "text_hash")
    return pa.concat_tables([pa.table({name: plan.samples.column(name) for name in names}) for plan in plans.all()])


def check_texts(plan: Plan) -> None:
    """Refuse a training plan that cannot fill a batch with distinct texts. Raises RecipeError.

    Sets in object stores are checked here first; all others also before the ranks start.
    """
    batch = plan.options.unique_texts_window
    if batch and (text := too_few_texts(batch, len(plan.samples.column("text_hash").unique()))):
        raise RecipeError(text)
