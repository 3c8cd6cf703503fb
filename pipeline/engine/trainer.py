"""The training loop: no stage names, no file formats, one screen."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path

import torch

from pipeline import dist
from pipeline.config.resolve import ResolvedRecipe
from pipeline.engine import checkpoint as checkpoints
from pipeline.engine.accumulate import accumulate
from pipeline.engine.metrics import MetricWriter, describe, peak_tflops
from pipeline.engine.progress import Progress
from pipeline.engine.reshard import to_universal
from pipeline.engine.resume import find_resume, restore_best
from pipeline.engine.setup import TrainEngine, start_engine
from pipeline.engine.signals import StopFlag
from pipeline.engine.state import TrainState, restore_rng, rng_state, seed_everything
from pipeline.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED, DivergedError, RecipeError
from pipeline.stages.base import AnyStage, EvaluationStopped, Normaliser
from pipeline.stages.batches import to_device
from pipeline.stages.data import StageContext, remote
from pipeline.stages.freezing import bytes_of, frozen_buffers, frozen_names
from shards.errors import DataError
from shards.load.loader import LoaderOptions, StepBatch, StepLoader, preload_workers

logger = logging.getLogger(__name__)


class Trainer:
    """Runs one stage on this rank. All ranks construct and run it alike."""

    stage: AnyStage

    def __init__(self, resolved: ResolvedRecipe, kind: type[AnyStage], ranks: dist.Ranks, device: torch.device) -> None:
        self.resolved, self.recipe, self.kind, self.ranks = resolved, resolved.recipe, kind, ranks
        self.run_dir = Path(self.recipe.run_dir)
        self.device = device
        self.state = TrainState()
        self.exit_code = EXIT_OK

    # -- preparation ---------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Plan, model, engine, resume: everything before the first step."""
        train = self.recipe.train
        seed_everything(self.recipe.seed, self.ranks.rank)
        resume = find_resume(self.run_dir, self.resolved)
        universal = self._universal(resume)
        kind = self.kind
        if self.recipe.data.workers:
            preload_workers(kind.__module__)  # while the model is built
        plans = kind.plans(self.recipe)
        self.plan = plans.train
        self.total_steps = self._total_steps()
        zero_stage = int(self.resolved.ds_config["zero_optimization"]["stage"])
        context = StageContext(self.recipe, self.ranks.rank, self.ranks.world_size, self.device, zero_stage)
        self.engine: TrainEngine
        self.stage, self.engine = start_engine(
            lambda: kind.build(context, plans), self.resolved, self.total_steps, load_universal=universal is not None
        )
        # every process draws differently from here on, but equally in every run of this recipe
        seed_everything(self.recipe.seed + 1, self.ranks.rank)
        if resume is not None:
            self.state = checkpoints.load(self.engine, resume, universal)
            restore_best(self.run_dir, self.state)
            logger.info("resumed %s at step %d", resume.path, self.state.step)
        self.loader = self._loader()
        self.metrics = MetricWriter(self.run_dir, train, self.recipe.name, self.state.step, self.ranks.is_main)
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        self.peak = peak_tflops(train, name)
        self.frozen_hash = self.hash_frozen()

    def _universal(self, resume: checkpoints.Checkpoint | None) -> Path | None:
        """The checkpoint converted for this world size, when it was saved at another one."""
        if resume is None or resume.world_size == self.ranks.world_size:
            return None
        folder = to_universal(resume) if self.ranks.is_main else None
        dist.barrier()
        return Path(dist.broadcast_object(str(folder)))

    def _total_steps(self) -> int:
        train = self.recipe.train
        if train.steps is not None:
            return train.steps
        assert train.epochs is not None  # checked when the recipe was loaded
        items = self.plan.items_per_epoch
        steps = int(items * train.epochs) // train.global_batch
        if steps == 0:
            raise RecipeError(
                f"train.epochs={train.epochs} of {items} items is less than one global batch of "
                f"{train.global_batch}; lower train.global_batch or raise train.epochs"
            )
        return steps

    def _loader(self) -> StepLoader:
        train, data = self.recipe.train, self.recipe.data
        options = LoaderOptions(
            rank=self.ranks.rank, world_size=self.ranks.world_size, global_batch=train.global_batch,
            micro_batch=train.micro_batch, workers=data.workers, remote=remote(data),
        )  # fmt: skip
        loader = StepLoader(self.plan, self.stage.fetch(), self.stage.collate(), options)
        if self.state.step:
            loader.load_state_dict(self.state.data)
        return loader

    # -- the loop ------------------------------------------------------------------------------------------------
    def fit(self, stop: StopFlag) -> TrainState:
        """Train to the last step, or until asked to stop (then a checkpoint is saved and `exit_code` says so)."""
        state, train = self.state, self.recipe.train
        with Progress(self.recipe.name, self.total_steps, state.step, self.ranks) as progress:
            self.last_save = time.monotonic()
            self._start_interval()
            # at step 0 there is nothing to save: a stop waits for the first step, where none has ended the process
            self._stop_evaluation = lambda: stop.requested and state.step > 0
            if state.step == 0:
                self._evaluate()
            elif state.evaluation_due:
                improved = self._evaluate()
                stop.begin()
                self._save(improved)
            batches = iter(self.loader)
            while state.step < self.total_steps and not state.evaluation_due:
                step_batch = next(batches)
                stop.begin()
                normaliser, must_stop, save_due = self._agree(step_batch, stop.requested)
                self._step(step_batch, normaliser)
                state.step += 1
                state.data = self.loader.state_dict()
                state.tokens_seen += normaliser.valid_tokens
                state.samples_seen += self.samples_in_step
                last = state.step == self.total_steps
                if state.step % train.log_every_steps == 0 or last or must_stop:
                    progress.update(state.step, self._log())
                evaluated = (train.eval_every_steps and state.step % train.eval_every_steps == 0) or last
                state.evaluation_due = bool(evaluated and self.recipe.data.eval)
                improved = self._evaluate() if evaluated and not must_stop else False
                must_stop = must_stop or state.evaluation_due
                every = train.checkpoint.every_steps
                if save_due or last or must_stop or improved or (every and state.step % every == 0):
                    self._save(improved)
                if must_stop:
                    break
            if state.step < self.total_steps or state.evaluation_due:
                self.exit_code = EXIT_INTERRUPTED if stop.interrupted else EXIT_PREEMPTED
        self.check_frozen()
        self.metrics.close()
        return state

    def _agree(self, batch: StepBatch, stop_requested: bool) -> tuple[Normaliser, bool, bool]:
        """The one all-reduce of a step: global token count, stop and save wishes, bad samples."""
        train = self.recipe.train
        minutes = train.checkpoint.every_minutes
        due = self.ranks.is_main and minutes > 0 and time.monotonic() - self.last_save > minutes * 60
        valid = sum(int(micro["valid_tokens"]) for micro in batch.micro_batches)
        samples = sum(int(micro["samples"]) for micro in batch.micro_batches)
        counts = torch.tensor([valid, samples, stop_requested, due, len(batch.skipped)], dtype=torch.int64)
        counts = dist.all_reduce_sum(counts.to(self.device))
        valid, self.samples_in_step, stop, save, bad = (int(value) for value in counts.tolist())
        if bad:
            found = dist.gather_objects([skipped.sample for skipped in batch.skipped])
            self.state.bad_samples = sorted({*self.state.bad_samples, *(sample for part in found for sample in part)})
        if len(self.state.bad_samples) > self.recipe.data.max_bad_samples:
            raise DataError(
                f"{len(self.state.bad_samples)} damaged samples, more than data.max_bad_samples="
                f"{self.recipe.data.max_bad_samples}",
                where=self.recipe.name,
                fix="run `slt shards lint` on the shard sets; the log names every damaged sample",
            )
        self.wait_seconds += batch.wait_seconds
        return Normaliser(valid, self.ranks.world_size), stop > 0, save > 0

    def _step(self, batch: StepBatch, normaliser: Normaliser) -> None:
        self.rate = self.engine.set_learning_rate(self.state.step)
        micro_batches = [to_device(micro, self.device) for micro in batch.micro_batches]
        skipped = self.engine.skipped_steps
        sums = accumulate(self.engine, self.stage, micro_batches, normaliser)
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()
        if self.peak is not None:  # from the batches on the host: reading lengths from a device would wait for it
            self.flops += self.stage.flops_per_step(list(batch.micro_batches))
        self.interval_steps += 1
        self.interval_tokens += normaliser.valid_tokens
        self.interval_samples += self.samples_in_step
        self._watch(self.engine.skipped_steps > skipped)

    def _watch(self, was_skipped: bool) -> None:
        """Count steps DeepSpeed did not apply; stop before a diverged run burns its budget."""
        self.state.skipped_steps = self.state.skipped_steps + 1 if was_skipped else 0
        if self.state.skipped_steps > self.recipe.train.max_skipped_steps:
            raise DivergedError(
                f"{self.recipe.name}: gradients were not finite in {self.state.skipped_steps} consecutive steps up to "
                f"step {self.state.step + 1}; lower train.optimizer.lr, lengthen warmup_steps, or check the data"
            )

    # -- reporting and saving ------------------------------------------------------------------------------------
    def _start_interval(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.flops, self.interval_tokens, self.interval_samples, self.wait_seconds = 0.0, 0, 0, 0.0
        self.interval_steps = 0
        self.interval_start = time.monotonic()

    def _log(self) -> dict[str, float]:
        """Reduce the interval's sums over ranks, write one row, start the next interval. All ranks must call."""
        names = sorted(self.sums)
        values = torch.stack([self.sums[name].double().reshape(()) for name in names])
        totals = dict(zip(names, dist.all_reduce_sum(values).tolist(), strict=True))
        seconds = time.monotonic() - self.interval_start
        row = {f"train/{name}": value for name, value in self.stage.reduce(totals).items()}
        row |= {
            "train/lr": self.rate,
            "train/grad_norm": self.engine.grad_norm(),
            "train/epoch": self.state.data["epoch"],
            "data/wait_seconds": self.wait_seconds,
            "data/bad_samples": len(self.state.bad_samples),
            "perf/seconds_per_step": seconds / self.interval_steps,
            "perf/tokens_per_second": self.interval_tokens / seconds,
            "perf/samples_per_second": self.interval_samples / seconds,
        }
        if self.peak is not None and self.flops:
            row["perf/mfu"] = self.flops / seconds / (self.peak * 1e12)
        self.metrics.write(self.state.step, row)
        self._start_interval()
        return row

    def _evaluate(self) -> bool:
        """Held-out metrics; True when they are the best so far. All ranks must call.

        Asked to stop meanwhile, it leaves the state as before it, and `evaluation_due` for the run that resumes.
        """
        module, random = self.engine.module, rng_state()
        module.eval()
        try:
            metrics = self.stage.evaluate(self.engine.forward, self._stop_evaluation)
        except EvaluationStopped:
            restore_rng(random)
            logger.info("%s step %d  held-out: stopped; done again when resumed", self.recipe.name, self.state.step)
            return False
        finally:
            module.train()
        self.state.evaluation_due = False
        if metrics:
            self.metrics.write(self.state.step, metrics)
            if self.ranks.is_main:
                shown = {name: value for name, value in metrics.items() if name in self.stage.headline}
                logger.info("%s step %d  held-out: %s", self.recipe.name, self.state.step, describe(shown))
        if self.stage.best_metric is None or self.stage.best_metric[0] not in metrics:
            return False
        name, direction = self.stage.best_metric
        value, best = metrics[name], self.state.best.get("value")
        improved = best is None or (value < best if direction == "min" else value > best)
        if improved:
            self.state.best = {"metric": name, "value": value, "step": self.state.step}
        return improved and self.state.step > 0

    def _save(self, improved: bool) -> None:
        path = checkpoints.save(self.engine, self.stage, self.run_dir, self.resolved, self.state)
        if improved:
            checkpoints.mark_best(self.run_dir, path)
        checkpoints.prune(self.run_dir, self.recipe.train.checkpoint.keep)
        self.last_save = time.monotonic()

    # -- frozen parts --------------------------------------------------------------------------------------------
    def hash_frozen(self) -> str:
        """sha256 over this rank's bytes of all frozen parameters and the buffers beside them, combined over ranks."""
        digest = hashlib.sha256()
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                local = getattr(parameter, "ds_tensor", parameter)
                digest.update(name.encode() + bytes_of(local))
        for name, buffer in frozen_buffers(self.engine.module):
            digest.update(name.encode() + bytes_of(buffer))
        return hashlib.sha256(json.dumps(dist.gather_objects(digest.hexdigest())).encode()).hexdigest()

    def check_frozen(self) -> None:
        """Our own invariant: what the freeze plan froze has not moved by a bit."""
        now = self.hash_frozen()
        assert now == self.frozen_hash, "a frozen parameter changed during training"
        if self.ranks.is_main and frozen_names(self.engine.module):
            logger.info("frozen parameters unchanged (sha256 %s)", now[:16])
