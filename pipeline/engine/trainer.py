"""The training loop: no stage names, no file formats, no clocks. Observers do the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.engine.accumulate import accumulate
from pipeline.engine.agreement import Agreement, agree
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.out_of_memory import named_if_out_of_memory
from pipeline.engine.prefetch import Staged, staged
from pipeline.engine.rollback import roll_back
from pipeline.engine.sinks.base import Metrics, Sink
from pipeline.engine.training import Training
from pipeline.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED
from shards.load.requests import StepBatch


class Trainer:
    """Runs a prepared training on this rank. All ranks build and run it alike.

    Args:
        training: what is trained.
        observers: in the order of their turns, equal on every rank.
        sinks: take the observers' metrics.
    """

    def __init__(self, training: Training, observers: list[Observer], sinks: list[Sink]) -> None:
        self.training, self.observers, self.sinks = training, observers, sinks

    def fit(self) -> int:
        """Train to the last step or until asked to stop; the exit code it returns says which."""
        training, state, phases = self.training, self.training.state, self.training.phases
        try:
            wishes = Wishes()
            for observer in self.observers:
                metrics = observer.on_start(wishes)
                wishes.metrics |= metrics
                self._write(metrics)
            batches = self._batches()
            while state.step < training.total_steps and not wishes.stop:
                copying = named_if_out_of_memory(training.resolved, f"the copy of step {state.step + 1}")
                with phases.during("data"), copying:
                    batch, micro_batches = next(batches)
                phases.enter("step")
                training.stop.begin()
                agreed = agree(training, batch, [observer.vote() for observer in self.observers])
                step = self._step(batch, micro_batches, agreed)
                phases.step = state.step
                del micro_batches  # so that only the coming step's are kept
                wishes = Wishes(stop=agreed.stop)
                for observer, votes in zip(self.observers, agreed.votes, strict=True):
                    metrics = observer.on_step(step, wishes, votes)
                    wishes.metrics |= metrics
                    self._write(metrics)
                if wishes.rollback:
                    self._roll_back(wishes)
            phases.enter("end")
            for sink in reversed(self.sinks):
                sink.end()
            for observer in self.observers:
                observer.on_end()
        finally:
            for sink in self.sinks:
                sink.close()
        if not wishes.finished and (state.step < training.total_steps or state.evaluation_due):
            return EXIT_INTERRUPTED if training.stop.interrupted else EXIT_PREEMPTED
        return EXIT_OK

    def _batches(self) -> Iterator[Staged]:
        """Steps of data until the run has all its own: a rollback makes it need more than it has left."""
        training, state = self.training, self.training.state
        while state.step < training.total_steps:
            yield from staged(training.loader, training.device, training.total_steps - state.step)
            training.loader.load_state_dict(state.data)

    def _roll_back(self, wishes: Wishes) -> None:
        training = self.training
        roll_back(training, wishes.rollback, wishes.trouble_after)
        training.phases.step = training.state.step
        for observer in self.observers:
            observer.on_rollback()
        for sink in self.sinks:
            sink.rolled_back(training.state.step)

    def _step(self, batch: StepBatch, micro_batches: list[Any], agreed: Agreement) -> FinishedStep:
        """Take one optimizer step and update the state. ``micro_batches`` are those of the batch, on the device."""
        training, state = self.training, self.training.state
        rate = training.engine.set_learning_rate(state.step)
        with named_if_out_of_memory(training.resolved, f"step {state.step + 1}"):
            sums = accumulate(training.engine, training.stage, micro_batches, agreed.normaliser)
        applied, grad_norm = training.engine.gate.applied, training.engine.gate.grad_norm
        state.step += 1
        state.skipped_steps = 0 if applied else state.skipped_steps + 1
        state.skipped_total += not applied
        state.data = training.loader.state_dict(batch)
        state.tokens_seen += agreed.normaliser.valid_tokens
        state.samples_seen += agreed.samples
        last = state.step == training.total_steps
        valid_tokens = agreed.normaliser.valid_tokens
        part_rates = training.engine.part_rates
        return FinishedStep(batch, valid_tokens, agreed.samples, rate, sums, last, applied, grad_norm, part_rates)

    def _write(self, metrics: Metrics) -> None:
        if metrics:
            for sink in self.sinks:
                sink.write(self.training.state.step, metrics)
