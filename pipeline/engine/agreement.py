"""What the ranks agree on before every step, in one exchange between their hosts."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import dist
from pipeline.engine.training import Training
from pipeline.errors import ClusterError
from pipeline.stages.base import Normaliser
from shards.errors import DataError
from shards.load.requests import StepBatch


@dataclass(frozen=True, slots=True)
class Agreement:
    """Equal on every rank."""

    normaliser: Normaliser
    samples: int
    """In the global batch."""
    stop: bool
    """Some rank was asked to stop."""
    votes: list[int]
    """One per observer, summed over the ranks."""


def agree(training: Training, batch: StepBatch, votes: list[int]) -> Agreement:
    """Sum tokens, stop requests, observers' votes and damaged samples over ranks, and take the largest of the
    micro-batches' maxima. All ranks must call.

    Raises:
        ClusterError: ranks with unequally many micro-batches, on every rank.
        DataError: more damaged samples than `data.max_bad_samples`, on every rank.
    """
    valid = sum(int(micro["valid_tokens"]) for micro in batch.micro_batches)
    samples = sum(int(micro["samples"]) for micro in batch.micro_batches)
    counts_of_rank = [valid, samples, int(training.stop.requested), len(batch.skipped), *votes]
    maxima = _maxima(batch)
    of_ranks = dist.host_counts([*counts_of_rank, *maxima.values(), len(batch.micro_batches)])
    *columns, micro_batches = zip(*of_ranks, strict=True)
    _check_micro_batches(training, micro_batches)
    valid, samples, stop, bad, *votes = (sum(column) for column in columns[: len(counts_of_rank)])
    largest = dict(zip(maxima, map(max, columns[len(counts_of_rank) :]), strict=True))
    if bad:
        _note_bad_samples(training, batch)
    _check_bad_samples(training)
    return Agreement(
        Normaliser(valid, training.ranks.world_size, largest, training.state.step), samples, stop > 0, votes
    )


def _check_micro_batches(training: Training, of_ranks: tuple[int, ...]) -> None:
    """Every micro-batch is a collective: with unequally many, some ranks would wait for the others forever."""
    other = next((rank for rank, count in enumerate(of_ranks) if count != of_ranks[0]), None)
    if other is not None:
        raise ClusterError(
            f"{training.recipe.name}: rank {other} has {of_ranks[other]} micro-batches in step"
            f" {training.state.step + 1}, rank 0 has {of_ranks[0]}; every rank must have as many. Start all ranks with"
            " the same recipe and the same version of this project; a loader of your own must divide"
            " train.global_batch evenly."
        )


def _maxima(batch: StepBatch) -> dict[str, int]:
    """The largest of each over this rank's micro-batches, in the order of their names."""
    micros = batch.micro_batches
    return {name: max(int(micro["maxima"][name]) for micro in micros) for name in sorted(micros[0]["maxima"])}


def _note_bad_samples(training: Training, batch: StepBatch) -> None:
    bad_of_ranks = dist.gather_objects([skipped.sample for skipped in batch.skipped])
    known = {*training.state.bad_samples, *(sample for part in bad_of_ranks for sample in part)}
    training.state.bad_samples = sorted(known)


def _check_bad_samples(training: Training) -> None:
    bad, limit = len(training.state.bad_samples), training.recipe.data.max_bad_samples
    if bad > limit:
        raise DataError(
            f"{bad} damaged samples, more than data.max_bad_samples={limit}",
            where=training.recipe.name,
            fix="run `slt shards lint` on the shard sets; the log names every damaged sample",
        )
