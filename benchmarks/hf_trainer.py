"""Hugging Face's Trainer with DeepSpeed over the samples of a recipe: the peer of our training loop."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.loops import Clock, Run, Timing, _losses, _stage_and_batches, peak_gib, reset_memory, resolved_recipe
from pipeline import dist
from pipeline.config.resolve import ResolvedRecipe
from pipeline.losses import IGNORE_LABEL
from pipeline.stages.base import AnyStage, Normaliser


class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Raw samples in memory."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return self.items[number]


def keep_items(items: list[Any]) -> dict[str, Any]:
    """A collate function that makes no batch."""
    return {"items": items, "valid_tokens": 0, "samples": len(items), "maxima": {}}


class Opaque:
    """A batch that the Trainer passes on as it is."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch


class OpaqueCollate:
    """Our collate function for the Trainer's DataLoader."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        return {"batch": Opaque(self.collate(items))}


class RowsCollate(OpaqueCollate):
    """Packed rows as the Trainer's users hold them: tokens, labels, and positions that restart with every document."""

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        batch = self.collate(items)
        positions = batch["packed"]["position_ids"]
        labels = batch["input_ids_BL"].masked_fill(positions == 0, IGNORE_LABEL)
        return {"input_ids": batch["input_ids_BL"], "labels": labels, "position_ids": positions}


class Whole(nn.Module):
    """A stage's model and loss as one module, which is what the Trainer trains."""

    def __init__(self, stage: AnyStage) -> None:
        super().__init__()
        self.module, self._stage = stage.module, [stage]

    def forward(self, batch: Opaque) -> dict[str, torch.Tensor]:
        from pipeline.stages.batches import to_device

        (stage,) = self._stage
        micro = to_device(batch.batch, stage.device)
        # the Trainer knows nothing of the global batch: every rank and micro-batch counts alike
        normaliser = Normaliser(int(micro["valid_tokens"]) * dist.world_size(), dist.world_size(), micro["maxima"])
        (loss,) = _losses(stage, self.module, [micro], normaliser)
        return {"loss": loss}


class ClockCallback(transformers.TrainerCallback):
    """The clock inside the Trainer."""

    def __init__(self, run: Run, timing: Timing) -> None:
        self.clock = Clock(run, timing)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.step()


def hugging_face(run: Run) -> Timing:
    """The Trainer, timed; its samples are drawn from those that our trainer would read."""
    reset_memory(run.device)
    resolved, timing = resolved_recipe(run.recipe, run.sets), Timing()
    arguments = _arguments(resolved, run)  # alive before the model is built: transformers partitions under ZeRO-3
    stage, batches = _stage_and_batches(resolved, run.device, lambda stage: keep_items)
    items = [item for micros in batches for micro in micros for item in micro["items"]]
    batch_of = stage.collate()
    timing.tokens = [sum(batch_of(micro["items"])["valid_tokens"] for micro in micros) for micros in batches]
    collate: OpaqueCollate = OpaqueCollate(batch_of)
    model: nn.Module = Whole(stage)
    if resolved.recipe.stage == "continued_pretraining":
        model, collate = stage.module.llm, RowsCollate(batch_of)  # type: ignore[assignment]
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Samples(items), data_collator=collate,
        callbacks=[ClockCallback(run, timing)],
    )  # fmt: skip
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    timing.peak_gib = peak_gib(run.device)
    trainer.model_wrapped.destroy()
    return timing


def _arguments(resolved: ResolvedRecipe, run: Run) -> transformers.TrainingArguments:
    train = resolved.recipe.train
    return transformers.TrainingArguments(
        output_dir=str(resolved.recipe.run_dir), deepspeed=dict(resolved.ds_config), max_steps=train.steps or 1,
        per_device_train_batch_size=train.micro_batch, gradient_accumulation_steps=resolved.accumulation_steps,
        learning_rate=train.optimizer.lr, weight_decay=train.optimizer.weight_decay,
        adam_beta1=train.optimizer.betas[0], adam_beta2=train.optimizer.betas[1],
        max_grad_norm=train.optimizer.clip_norm, lr_scheduler_type="cosine", bf16=train.precision == "bf16",
        use_cpu=run.device == "cpu", logging_steps=train.log_every_steps, save_strategy="no", report_to=[],
        remove_unused_columns=False, disable_tqdm=True, dataloader_num_workers=resolved.recipe.data.workers, seed=0,
    )  # fmt: skip
