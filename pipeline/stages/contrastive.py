"""Visual contrastive pretraining: align the hierarchical visual encoder with a frozen text encoder, at sentence
level (CLIP, arXiv 2103.00020) and at word level (CiCo, arXiv 2303.12793), so that word tokens become compatible
with token embeddings (arXiv 2412.16524).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pipeline import dist
from pipeline.config.inputs import too_few_texts
from pipeline.config.schema import ContrastiveConfig, Recipe
from pipeline.errors import RecipeError
from pipeline.losses import clamped_scale
from pipeline.models.clip_layout import ClipLayout
from pipeline.models.contrastive import ContrastiveModel
from pipeline.models.recompute import checkpoint_gradients, share_of
from pipeline.models.registry import build_text_encoder, build_visual
from pipeline.models.streams import Inputs, with_frames
from pipeline.models.text_cache import TextFeatureCache
from pipeline.models.visual import HierarchicalVisualEncoder
from pipeline.stages.base import CachedStage, ExportCard, ExportPlan, LossParts, Normaliser
from pipeline.stages.batches import ContrastiveBatch, ContrastiveCollate
from pipeline.stages.contrastive_loss import LOSSES, contrastive_loss, tile_mib
from pipeline.stages.data import Plans, StageContext
from pipeline.stages.glosses import (
    IN_INDEX,
    AlignedGlosses,
    FetchWithGlosses,
    GlossTargets,
    Recognised,
    aligned_texts,
    check_warm_start,
    gloss_metrics,
)
from pipeline.stages.held_out_retrieval import HeldOutPair, held_out_metrics, pairs_of
from pipeline.stages.video import VideoStage, check_video, merge_over_ranks, probed_inputs
from shards.order.options import PlanOptions
from shards.order.plan import Plan
from shards.schema import text_hash

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
        "eval/wer",
    )
    module: ContrastiveModel

    def __init__(
        self,
        context: StageContext,
        module: ContrastiveModel,
        texts: TextFeatureCache,
        targets: GlossTargets | None = None,
    ) -> None:
        """``targets``: what the gloss head learns, if there is one."""
        super().__init__(context, module)
        self.texts, self.targets = texts, targets

    @classmethod
    def plan_options(cls, recipe: Recipe, train: bool) -> PlanOptions:
        window = recipe.train.global_batch if train and recipe.data.unique_texts else 0
        return replace(super().plan_options(recipe, train), unique_texts_window=window)

    @classmethod
    def text_columns(cls, recipe: Recipe, train: bool) -> tuple[str, ...]:
        config = recipe.contrastive
        return (*super().text_columns(recipe, train), *([config.glosses] if _reads_column(config) else []))

    @classmethod
    def build(cls, context: StageContext, plans: Plans) -> Self:
        """Encodes every distinct text once, each rank its share; does not keep the text encoder."""
        recipe, model = context.recipe, context.recipe.model
        assert model.visual is not None and model.text_encoder is not None  # checked when the recipe was loaded
        encoder = build_text_encoder(model.text_encoder, context.device)
        visual = build_visual(model.visual, recipe.data.image_pixels, context.dtype)
        visual.choose_attention(model.attention, context.device)
        checkpoint_gradients(visual, share_of(model))
        config = recipe.contrastive
        targets = GlossTargets.of(plans.train, visual, config) if config.ctc.used else None
        if targets is not None:
            check_warm_start(model, targets.vocabulary)
        module = ContrastiveModel(visual, encoder.width, config, len(targets.vocabulary) if targets else 0)
        check_texts(plans.train)
        cache = TextFeatureCache(Path(recipe.run_dir) / "text_features")
        texts = texts_of(plans, config, recipe.data.references.train)
        cache.build(texts, encoder, context.rank, context.world_size, dist.barrier)
        module.set_text_statistics(cache.statistics())
        log.info("contrastive loss: tiles of %d MiB", tile_mib(config, context.device))
        stage = cls(context, module, cache, targets)
        # only now is it known which backbone the encoder has (`model.init_from`), and whether it trains
        check_video(context, plans, visual, model.text_encoder.path)
        return stage

    def freeze_plan(self) -> dict[str, bool]:
        towers = ("visual", "sentence_head", "word_head", "text_sentence_head", "text_token_head")
        heads = ("frame_head", "gloss_head")
        return {part: True for part in (*towers, *heads, "log_scale", "log_token_scale", "sentence_bias")}

    def fetch(self, train: bool) -> Callable[..., Any]:
        """Clips whose rows hold the glosses that the recipe names."""
        config, clips = self.recipe.contrastive, super().fetch(train)
        return FetchWithGlosses(clips, config.glosses) if _reads_column(config) else clips

    def collate(self) -> ContrastiveCollate:
        aligned = AlignedGlosses(self.texts) if self.recipe.contrastive.alignment.used else None
        several = bool(self.recipe.data.references.train)
        return replace(self.held_out_collate(), targets=self.targets, aligned=aligned, several=several)

    def held_out_collate(self) -> ContrastiveCollate:
        """`collate` of clips that nothing is learned from: their glosses may be missing or unknown."""
        return ContrastiveCollate(self.module.visual.config.clip_sizes(), self.texts)

    def features(self, model: Callable[..., Any], batch: ContrastiveBatch) -> dict[str, torch.Tensor]:
        texts = (batch["text_BD"], batch["tokens_ND"])
        features: dict[str, torch.Tensor] = model(
            batch["frames_NHWC"], None, *texts, batch["layout"], batch.get("gloss_tokens_ND")
        )
        return features

    def for_replay(self, batch: ContrastiveBatch, features: dict[str, torch.Tensor]) -> ContrastiveBatch:
        """A frozen backbone runs once: its features, a hundredth of the images' size, take their place."""
        pooled_NP = features.pop("pooled_NP", None)
        return batch if pooled_NP is None else {**batch, "frames_NHWC": with_frames(batch["frames_NHWC"], pooled_NP)}

    def contrast(
        self, features: list[dict[str, torch.Tensor]], batches: list[ContrastiveBatch], normaliser: Normaliser
    ) -> LossParts:
        return contrastive_loss(features, batches, self.recipe.contrastive, normaliser)

    def reduce(self, sums: dict[str, float]) -> dict[str, float]:
        samples = max(sums["samples"], 1)
        names = ("loss", *(f"{name}_loss" for name in LOSSES), "logit_scale", "gloss_left_out")
        return {name: sums[name] / samples for name in names if name in sums}

    def evaluate(self, model: Callable[..., Any], stop_requested: Callable[[], bool]) -> dict[str, float]:
        """Retrieval on the held-out sources in both directions, by what the objective trains (`held_out_metrics`), and
        the word error rate of the gloss head over the clips that have glosses (``eval/wer``)."""
        sources, config = self.recipe.data.eval, self.recipe.contrastive
        if not sources:
            return {}
        pair_of_sample: dict[int, HeldOutPair] = {}
        recognised: dict[int, Recognised] = {}
        token_scale = 0.0
        with torch.no_grad():
            for batch, samples in self.held_out(sources, self.held_out_collate(), stop_requested):
                features = self.features(model, batch)
                token_scale = float(clamped_scale(features["log_token_scale"].float(), config.max_logit_scale))
                pairs = pairs_of(features, batch, config)
                pair_of_sample.update(zip(samples, pairs[: len(samples)], strict=True))  # padding has no samples
                if self.targets is not None:
                    recognised.update(zip(samples, self.targets.recognised(features, batch), strict=False))
            metrics = held_out_metrics(merge_over_ranks(pair_of_sample), config, token_scale, self.device)
        if self.targets is not None:
            metrics |= gloss_metrics(merge_over_ranks(recognised))
        # all ranks must agree on the best checkpoint, even if devices round differently
        return {f"eval/{name}": value for name, value in dist.broadcast_object(metrics).items()}

    def outputs(
        self, model: Callable[..., Any], frames_NHWC: Inputs, lengths_B: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        texts = self.texts.lookup(self.texts.first(2))
        layout = ClipLayout.of(lengths_B.tolist(), self.module.visual.config.clip_sizes()).to(self.device)
        text = (texts.text_BD.to(self.device), texts.tokens_ND.to(self.device))
        features = model(frames_NHWC, None, *text, layout)
        words_BSE, mask_BS = layout.pad_words(features["words_ME"])
        outputs = {"video_BE": features["video_BE"], "words_BSE": words_BSE, "words_mask_BS": mask_BS}
        if self.targets is not None:
            outputs["glosses_BSV"] = layout.pad_words(features["glosses_MV"])[0]
        return {name: value.float() for name, value in outputs.items()}

    def write_export_files(self, folder: Path) -> ExportPlan:
        visual = self.module.visual
        if visual.backbone.trains:  # of an encoder that was loaded: features of its old backbone are another's now
            visual.config.backbone_fingerprint = ""
        visual.config.save_pretrained(folder)
        if self.targets is not None:
            self.targets.vocabulary.save(folder)
        return self.export_plan(prefix="visual.", tied=[])

    @classmethod
    def exported(cls, folder: Path, probe: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = HierarchicalVisualEncoder.from_pretrained(folder, dtype=dtype).eval()
        output, heads = model(probed_inputs(probe), probe["frame_lengths"]), load_file(folder / "heads.safetensors")
        outputs = {
            "video_BE": output.sentence_BD @ heads["sentence_head.weight"].T,
            "words_BSE": output.layout.pad_words(output.words_MD)[0] @ heads["word_head.weight"].T,
        }
        if "gloss_head.weight" in heads:
            glosses_MV = F.linear(output.words_MD, heads["gloss_head.weight"], heads["gloss_head.bias"])
            outputs["glosses_BSV"] = output.layout.pad_words(glosses_MV)[0]
        return outputs


def _reads_column(config: ContrastiveConfig) -> bool:
    """Whether glosses are learned that are not those of the index."""
    return (config.ctc.used or config.alignment.used) and config.glosses != IN_INDEX


def texts_of(plans: Plans, config: ContrastiveConfig, references: Sequence[str] = ()) -> pa.Table:
    """``text`` and ``text_hash`` of every sample; of those trained on also the text columns ``references``, and their
    glosses if they are aligned."""
    names = ("text", "text_hash")
    tables = [pa.table({name: plan.samples.column(name) for name in names}) for plan in plans.all()]
    samples = plans.train.samples
    further = {text for n in range(len(samples)) for column in references for text in samples.texts(column, n)}
    texts = sorted(further) + (list(aligned_texts(plans.train, config.glosses)) if config.alignment.used else [])
    if texts:
        hashes = pa.array([text_hash(text) for text in texts], tables[0].schema.field("text_hash").type)
        tables.append(pa.table({"text": pa.array(texts, tables[0].schema.field("text").type), "text_hash": hashes}))
    return pa.concat_tables(tables)


def check_texts(plan: Plan) -> None:
    """Refuse a training plan that cannot fill a batch with distinct texts. Raises RecipeError.

    Sets in object stores are checked here first; all others also before the ranks start.
    """
    batch = plan.options.unique_texts_window
    if batch and (text := too_few_texts(batch, len(plan.samples.column("text_hash").unique()))):
        raise RecipeError(text)
