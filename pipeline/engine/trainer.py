"""The training loop: no stage names, no file formats, no clocks. Observers do the rest."""

from __future__ import annotations

from typing import Any

from pipeline.engine.accumulate import accumulate
from pipeline.engine.agreement import Agreement, agree
from pipeline.engine.observers.base import FinishedStep, Observer, Wishes
from pipeline.engine.out_of_memory import named_if_out_of_memory
from pipeline.engine.prefetch import staged
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
                self._write(observer.on_start(wishes))
            batches = staged(training.loader, training.device, max(training.total_steps - state.step, 0))
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
                    self._write(observer.on_step(step, wishes, votes))
            phases.enter("end")
            for sink in reversed(self.sinks):
                sink.end()
            for observer in self.observers:
                observer.on_end()
        finally:
            for sink in self.sinks:
                sink.close()
        if state.step < training.total_steps or state.evaluation_due:
            return EXIT_INTERRUPTED if training.stop.interrupted else EXIT_PREEMPTED
        return EXIT_OK

    def _step(self, batch: StepBatch, micro_batches: list[Any], agreed: Agreement) -> FinishedStep:
        """Take one optimizer step and update the state. ``micro_batches`` are those of the batch, on the device."""
        training, state = self.training, self.training.state
        rate = training.engine.set_learning_rate(state.step)
        with named_if_out_of_memory(training.resolved, f"step {state.step + 1}"):
            sums = accumulate(training.engine, training.stage, micro_batches, agreed.normaliser)
        state.step += 1
        state.data = training.loader.state_dict(batch)
        state.tokens_seen += agreed.normaliser.valid_tokens
        state.samples_seen += agreed.samples
        last = state.step == training.total_steps
        return FinishedStep(batch, agreed.normaliser.valid_tokens, agreed.samples, rate, sums, last)

    def _write(self, metrics: Metrics) -> None:
        if metrics:
            for sink in self.sinks:
                sink.write(self.training.state.step, metrics)
