"""Continued pretraining: next-token prediction on packed documents, to adapt an LLM to the sign domain.

The corpus mixes plain text with "words in sign order -> sentence" pairs (see `shards.corpora.text`): the LLM is
frozen in the connector stage, so all it does with word-like embeddings is learned here (arXiv 2412.16524,
"linguistic continued pretraining").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from pipeline import dist
from pipeline.config.schema import Recipe, SourceConfig
from pipeline.errors import RecipeError
from pipeline.models import attention, kernels
from pipeline.models.chunked_mlp import chunk_mlps
from pipeline.models.language import load_language, pad_id
from pipeline.models.offload import offload_layer_inputs
from pipeline.models.packed_lm import PackedCausalLm
from pipeline.models.pretrained import ADAPTER_FOLDER, check_positions
from pipeline.models.recompute import checkpoint_gradients, share_of
from pipeline.stages.base import ExportCard, ExportPlan, LossParts, Normaliser, SummedStage
from pipeline.stages.batches import PackCollate, PackedBatch, fetch_pack
from pipeline.stages.data import Plans, StageContext
from pipeline.stages.slices import SliceCollate
from shards.order.options import PlanOptions
from shards.order.plan import Plan
from shards.text import tokenizer_fingerprint


class ContinuedPretraining(SummedStage[PackedBatch]):
    """Stage 1."""

    name = "continued_pretraining"
    card = ExportCard(
        what="A causal language model adapted to the sign domain by continued pretraining.",
        pipeline_tag="text-generation",
        load="from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(FOLDER)",
    )
    best_metric = ("eval/loss", "min")
    headline = ("eval/perplexity",)
    module: PackedCausalLm

    def __init__(self, context: StageContext, module: PackedCausalLm, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(context, module)
        self.tokenizer = tokenizer
        self.matmul_parameters = module.matmul_parameters()
        self.trained_matmul_parameters = module.matmul_parameters(trained=True)

    @classmethod
    def plan_options(cls, recipe: Recipe, train: bool) -> PlanOptions:
        data = recipe.data
        return PlanOptions(
            seed=recipe.seed,
            kind="pack",
            block_tokens=data.block_tokens,
            epoch_samples=data.epoch_samples if train else 0,
            shuffle=train,
        )

    @classmethod
    def build(cls, context: StageContext, plans: Plans) -> Self:
        recipe, config = context.recipe, context.recipe.model.llm
        assert config is not None  # checked when the recipe was loaded
        llm, tokenizer = load_language(config, context.dtype, attention.implementation("sdpa"))
        attention.choose_for(llm, recipe.model.attention, context.device)
        check_positions(
            llm, recipe.data.block_tokens, "data.block_tokens", "model.llm", "lower it to the table's length"
        )
        options = recipe.continued_pretraining
        attention.check_heads(llm, context.sequence.size)
        fused = kernels.choose(recipe.model.kernels, llm, context.device)
        if fused.layers == "liger":
            kernels.fuse_layers(llm)
        if options.mlp_chunk_tokens:
            for mlp in chunk_mlps(llm, options.mlp_chunk_tokens):
                dist.gather_as_one(mlp)
        checkpoint_gradients(llm, share_of(recipe.model))
        if options.offload_activations:
            offload_layer_inputs(llm)
        check_tokenizer(plans.all(), tokenizer)
        stage = cls(context, PackedCausalLm(llm, options.loss_chunk_tokens, fused.loss), tokenizer)
        if options.offload_activations and not llm.get_input_embeddings().weight.requires_grad:
            llm.enable_input_require_grads()  # layers that recompute from host memory get gradients through their input
        return stage

    def freeze_plan(self) -> dict[str, bool]:
        return {"llm": True}

    def fetch(self, train: bool) -> Callable[..., Any]:
        del train  # documents are read as they are
        return fetch_pack

    def collate(self) -> PackCollate | SliceCollate:
        packs, sequence = PackCollate(self.recipe.data.block_tokens, pad_id(self.tokenizer)), self.context.sequence
        return packs if sequence.size == 1 else SliceCollate(packs, sequence.rank, sequence.size)

    def loss(self, model: Callable[..., Any], batch: PackedBatch, normaliser: Normaliser) -> LossParts:
        loss_sum = self._forward(model, batch)
        valid = loss_sum.new_full((), batch["valid_tokens"])
        return LossParts(normaliser.scale(loss_sum), {"loss": loss_sum.detach(), "valid_tokens": valid})

    def _forward(self, model: Callable[..., Any], batch: PackedBatch) -> torch.Tensor:
        packed, sequence = batch["packed"], self.context.sequence
        if sequence.size > 1:
            packed = {**packed, "sequence_group": sequence}
        loss_sum: torch.Tensor = model(batch["input_ids_BL"], packed, batch["targets_BL"])
        return loss_sum

    def reduce(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["loss"] / max(sums["valid_tokens"], 1)
        return {"loss": loss, "perplexity": perplexity(loss), "tokens": sums["valid_tokens"]}

    def evaluate(self, model: Callable[..., Any], stop_requested: Callable[[], bool]) -> dict[str, float]:
        """Held-out loss and perplexity over all sources, and per corpus."""
        totals: dict[str, torch.Tensor] = {}
        for source in self.recipe.data.eval:
            for corpus in self._corpora(source):
                batches = self.held_out([source.model_copy(update={"corpus": corpus})], self.collate(), stop_requested)
                sums = self._evaluate_corpus(model, batches)
                totals[corpus] = totals.get(corpus, torch.zeros(2, dtype=torch.float64)) + sums
        metrics = {f"eval/perplexity/{corpus}": perplexity(_mean(sums)) for corpus, sums in totals.items()}
        if totals:
            metrics["eval/loss"] = _mean(sum(totals.values(), torch.zeros(2, dtype=torch.float64)))
            metrics["eval/perplexity"] = perplexity(metrics["eval/loss"])
        return metrics

    def _corpora(self, source: SourceConfig) -> list[str]:
        if source.corpus is not None:
            return [source.corpus]
        return self.plan(self.recipe, [source], train=False).samples.distinct("corpus")

    def _evaluate_corpus(
        self, model: Callable[..., Any], batches: Iterator[tuple[PackedBatch, list[int]]]
    ) -> torch.Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch, samples in batches:
                loss_sum = self._forward(model, batch).double()
                if samples:
                    sums += torch.stack([loss_sum, loss_sum.new_full((), batch["valid_tokens"])])
        return dist.all_reduce_sum(sums).cpu()

    def flops_per_step(self, batches: list[PackedBatch]) -> float:
        """6 N per token (4 N of frozen weights, which need no gradient of their own) plus causal attention over each
        document, 12 L d T_eff / 2 per token (arXiv 2204.02311, B); ranks that share a sequence share its work."""
        config = self.module.llm.config
        matmul = 4 * self.matmul_parameters + 2 * self.trained_matmul_parameters
        total = 0.0
        for batch in batches:
            lengths = batch["document_lengths"].double()
            tokens, squares = float(lengths.sum()), float((lengths**2).sum())
            total += tokens * matmul + 6 * config.num_hidden_layers * config.hidden_size * squares
        return total / self.context.sequence.size

    def probe(self, model: Callable[..., Any]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids_BL = torch.randint(0, len(self.tokenizer), (1, 32), generator=generator).to(self.device)
        with torch.no_grad():
            logits_BLV = model(ids_BL, attention.packed_kwargs(torch.zeros_like(ids_BL)))
        return {"input_ids": ids_BL.cpu(), "logits": logits_BLV.float().cpu()}

    def write_export_files(self, folder: Path) -> ExportPlan:
        llm = self.module.llm
        llm.config.save_pretrained(folder)
        if llm.generation_config is not None:
            llm.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        tied = ["lm_head.weight"] if getattr(llm.config, "tie_word_embeddings", False) else []
        return self.export_plan(prefix="llm.", tied=tied)

    @classmethod
    def exported(cls, folder: Path, probe: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        if (folder / ADAPTER_FOLDER).is_dir():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, folder / ADAPTER_FOLDER)
        return {"logits": model(input_ids=probe["input_ids"], use_cache=False).logits}


def check_tokenizer(plans: list[Plan], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse shards tokenised for another model. Raises RecipeError."""
    expected = tokenizer_fingerprint(tokenizer)
    for source in (source for plan in plans for source in plan.sources):
        recorded = source.shard_set.manifest.options.get("tokenizer")
        if recorded != expected:
            raise RecipeError(
                f"{source.shard_set.dir}: was tokenised with another tokenizer (fingerprint {recorded}) than "
                f"model.llm uses ({expected}); rebuild the shards with `slt shards build text --tokenizer ...`"
            )


def perplexity(loss: float) -> float:
    """exp of a mean loss per token, bounded so that it stays finite."""
    return math.exp(min(loss, 80.0))


def _mean(loss_and_tokens: torch.Tensor) -> float:
    return float(loss_and_tokens[0] / loss_and_tokens[1])
