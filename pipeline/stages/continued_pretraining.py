"""Continued pretraining: next-token prediction on packed documents, to adapt an LLM to the sign domain.

The corpus mixes plain text with "words in sign order -> sentence" pairs (see `shards.corpora.text`): the LLM is
frozen in the connector stage, so whatever it will do with word-like embeddings is learned here (arXiv 2412.16524,
"linguistic continued pretraining").
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from pipeline import dist
from pipeline.config.schema import SourceConfig
from pipeline.errors import RecipeError
from pipeline.losses import token_cross_entropy
from pipeline.models import attention
from pipeline.models.language import decoder, load_language, output_head, pad_id
from pipeline.models.pretrained import check_positions
from pipeline.stages.base import ExportPlan, LossParts, MicroBatch, Normaliser, SummedStage, frozen_names, to_device
from pipeline.stages.batches import PackCollate, fetch_pack
from shards.order.options import PlanOptions
from shards.order.plan import Plan
from shards.text import tokenizer_fingerprint

logger = logging.getLogger(__name__)


class PackedCausalLm(nn.Module):
    """A causal LM over packed documents that returns its summed loss; logits exist one chunk at a time."""

    llm: Any

    def __init__(self, llm: nn.Module, loss_chunk_tokens: int) -> None:
        super().__init__()
        self.llm = llm
        self.loss_chunk_tokens = loss_chunk_tokens

    def forward(
        self, input_ids_BL: torch.Tensor, packed: dict[str, Any], labels_BL: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packs -> (summed loss, labelled tokens); without labels (last hidden states, logits [B, L, V]).

        ``packed``: document borders from `pipeline.models.attention.packed_kwargs`.
        """
        hidden_BLD = decoder(self.llm)(input_ids=input_ids_BL, **packed).last_hidden_state
        head = output_head(self.llm)
        if labels_BL is None:
            return hidden_BLD, head(hidden_BLD)
        # as many head calls on every rank as the fullest pack needs: under ZeRO-3 each call is a collective
        chunks = math.ceil(input_ids_BL.numel() / self.loss_chunk_tokens)
        return token_cross_entropy(hidden_BLD, head, labels_BL, self.loss_chunk_tokens, min_chunks=chunks)


class ContinuedPretraining(SummedStage):
    """Stage 1."""

    name: ClassVar[str] = "continued_pretraining"
    best_metric: ClassVar[tuple[str, Literal["min", "max"]] | None] = ("eval/loss", "min")
    headline: ClassVar[tuple[str, ...]] = ("eval/perplexity",)

    def build(self) -> nn.Module:
        config = self.recipe.model.llm
        assert config is not None  # checked when the recipe was loaded
        backend = attention.choose(self.recipe.model.attention, self.device, self.dtype)
        llm, self.tokenizer = load_language(config, self.dtype, attention.implementation(backend))
        check_positions(
            llm, self.recipe.data.block_tokens, "data.block_tokens", "model.llm", "lower it to the table's length"
        )
        if self.recipe.model.gradient_checkpointing:
            llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return PackedCausalLm(llm, self.recipe.continued_pretraining.loss_chunk_tokens)

    def freeze_plan(self) -> dict[str, bool]:
        return {"llm": True}

    def plan_options(self, train: bool) -> PlanOptions:
        data = self.recipe.data
        return PlanOptions(
            seed=self.recipe.seed,
            kind="pack",
            block_tokens=data.block_tokens,
            epoch_samples=data.epoch_samples if train else 0,
            shuffle=train,
        )

    def fetch(self) -> Callable[..., Any]:
        return fetch_pack

    def collate(self) -> Callable[..., MicroBatch]:
        return PackCollate(self.recipe.data.block_tokens, pad_id(self.tokenizer))

    def check_data(self, plan: Plan) -> None:
        wanted = tokenizer_fingerprint(self.tokenizer)
        for source in plan.sources:
            found = source.shard_set.manifest.options.get("tokenizer")
            if found != wanted:
                raise RecipeError(
                    f"{source.shard_set.dir}: was tokenised with another tokenizer (fingerprint {found}) than "
                    f"model.llm uses ({wanted}); rebuild the shards with `slt shards build text --tokenizer ...`"
                )

    def loss(self, model: Callable[..., Any], batch: MicroBatch, normaliser: Normaliser) -> LossParts:
        loss_sum, valid = self._forward(model, batch)
        return LossParts(normaliser.scale(loss_sum), {"loss": loss_sum.detach(), "valid_tokens": valid.float()})

    def _forward(self, model: Callable[..., Any], batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return model(batch["input_ids_BL"], batch["packed"], batch["labels_BL"])

    def reduce(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["loss"] / max(sums["valid_tokens"], 1)
        return {"loss": loss, "perplexity": math.exp(min(loss, 80.0)), "tokens": sums["valid_tokens"]}

    def evaluate(self, model: Callable[..., Any], module: Any) -> dict[str, float]:
        """Held-out loss and perplexity over all sources, and per corpus."""
        totals: dict[str, torch.Tensor] = {}
        for source in self.recipe.data.eval:
            for corpus in self._corpora(source):
                sums = self._evaluate_corpus(model, source.model_copy(update={"corpus": corpus}))
                totals[corpus] = totals.get(corpus, torch.zeros(2, dtype=torch.float64)) + sums
        metrics: dict[str, float] = {}
        for corpus, (loss_sum, valid) in totals.items():
            metrics[f"eval/perplexity/{corpus}"] = math.exp(min(float(loss_sum / valid), 80.0))
        if totals:
            loss_sum, valid = sum(totals.values(), torch.zeros(2, dtype=torch.float64))
            metrics["eval/loss"] = float(loss_sum / valid)
            metrics["eval/perplexity"] = math.exp(min(metrics["eval/loss"], 80.0))
        return metrics

    def _corpora(self, source: SourceConfig) -> list[str]:
        if source.corpus is not None:
            return [source.corpus]
        return self.plan([source], train=False).samples.distinct("corpus")

    def _evaluate_corpus(self, model: Callable[..., Any], source: SourceConfig) -> torch.Tensor:
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for batch, counts in self.held_out_batches(self.held_out([source])):
                loss_sum, valid = self._forward(model, to_device(batch, self.device))
                if counts:
                    sums += torch.stack([loss_sum.double(), valid.double()])
        return dist.all_reduce_sum(sums).cpu()

    def flops_per_step(self, batches: list[MicroBatch]) -> float:
        """6 N per token plus causal attention over each document, 12 L d T_eff / 2 per token (arXiv 2204.02311, B)."""
        config = self.llm_config
        matmul = 6 * (self.matmul_parameters)
        total = 0.0
        for batch in batches:
            lengths = batch["document_lengths"].double()
            tokens, squares = float(lengths.sum()), float((lengths**2).sum())
            total += tokens * matmul + 6 * config.num_hidden_layers * config.hidden_size * squares
        return total

    def attach(self, module: Any) -> None:
        """Remember sizes for FLOPs before the engine partitions the parameters."""
        self.llm_config = module.llm.config
        sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in module.llm.named_parameters()}
        embedding = {n for n in sizes if "embed_tokens" in n}
        tied = bool(getattr(self.llm_config, "tie_word_embeddings", False))
        # the head is a matmul even when it shares the embedding's weights; the look-up itself is not
        self.matmul_parameters = sum(v for n, v in sizes.items() if n not in embedding or tied)

    def probe(self, model: Callable[..., Any]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids_BL = torch.randint(0, len(self.tokenizer), (1, 32), generator=generator).to(self.device)
        packed = attention.packed_kwargs(torch.zeros_like(ids_BL))
        with torch.no_grad():
            _, logits_BLV = model(ids_BL, packed)
        return {"input_ids": ids_BL.cpu(), "logits": logits_BLV.float().cpu()}

    def write_export_files(self, module: Any, folder: Path) -> ExportPlan:
        llm = module.llm
        llm.config.save_pretrained(folder)
        if llm.generation_config is not None:
            llm.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        tied = ["lm_head.weight"] if getattr(llm.config, "tie_word_embeddings", False) else []
        return ExportPlan(prefix="llm.", tied=tied, frozen=frozen_names(module))
