"""How sure a corpus score is: bootstrap over sentences (Koehn 2004), paired, and over several runs of a system.

A sentence adds ten counts to corpus BLEU (matches and totals of four orders, and two lengths), so a resampled corpus is
one matrix product, and all systems are resampled alike. Scores are sacreBLEU's, with its default smoothing.

Legend: S sentences, K runs (seeds) of a system, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.metrics import sentence_metric
from pipeline.evaluate.protocols import Protocol
from shards.errors import DataError

ORDERS = 4
RESAMPLES = 1000
"""As sacreBLEU's default."""
Counts = NDArray[np.int64]
"""[..., 10]: matches of orders 1 to 4, totals of orders 1 to 4, length of hypothesis and of reference."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A score in percent and where 95 % of its resamples lie."""

    score: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.score:.1f} ({self.low:.1f} to {self.high:.1f})"


@dataclass(frozen=True, slots=True)
class Difference(Interval):
    """Score of a system less that of its baseline, on the same sentences."""

    p: float
    """How often chance alone makes a difference as large, two-sided; at least 1 / (resamples + 1)."""


def bleu_counts(hypotheses: Sequence[str], references: Sequence[Sequence[str]], protocol: Protocol) -> Counts:
    """What every sentence adds to corpus BLEU, [S, 10].

    Args:
        hypotheses: one text per sentence.
        references: one or more per sentence; none of them empty.
        protocol: how texts are prepared and tokenised.
    """
    metric = sentence_metric(protocol)
    rows = []
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        found = metric.sentence_score(protocol.prepare(hypothesis), [protocol.prepare(text) for text in texts])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.asarray(rows, dtype=np.int64).reshape(-1, 2 * ORDERS + 2)


def bleu_of(counts: Counts) -> NDArray[np.float64]:
    """Corpus BLEU-4 in percent of summed counts [..., 10]; sacreBLEU's with smoothing `exp`."""
    matches, totals = counts[..., :ORDERS].astype(float), counts[..., ORDERS : 2 * ORDERS].astype(float)
    system, reference = counts[..., -2].astype(float), counts[..., -1].astype(float)
    halves = np.ones(counts.shape[:-1])
    log_sum = np.zeros(counts.shape[:-1])
    for order in range(ORDERS):
        none = matches[..., order] == 0
        halves = np.where(none, halves * 2, halves)
        found = np.where(none, 1 / halves, matches[..., order])
        with np.errstate(divide="ignore"):
            log_sum += np.log(found / np.maximum(totals[..., order], 1))
    with np.errstate(divide="ignore", over="ignore"):
        penalty = np.where(system < reference, np.exp(1 - reference / np.maximum(system, 1e-9)), 1.0)
    possible = (totals > 0).all(-1) & (matches > 0).any(-1)
    return np.where(possible, 100 * penalty * np.exp(log_sum / ORDERS), 0.0)


def interval(runs: Counts, resamples: int = RESAMPLES, seed: int = 12345) -> Interval:
    """BLEU-4 of a system, the mean over its runs, with the interval of its resamples.

    Args:
        runs: [K, S, 10], the same sentences in every run.
        resamples: how often the corpus is drawn anew.
        seed: of the draws; the same draws for every system with as many sentences.
    """
    drawn = _resampled(runs, resamples, seed)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(_mean_bleu(runs)), float(low), float(high))


def difference(runs: Counts, baseline: Counts, resamples: int = RESAMPLES, seed: int = 12345) -> Difference:
    """A system against a baseline on the same sentences, each the mean over its runs; they may differ in number.

    Raises:
        DataError: they are not of equally many sentences.
    """
    if runs.shape[1] != baseline.shape[1]:
        raise DataError(
            f"a system with {runs.shape[1]} sentences is compared with one of {baseline.shape[1]}",
            where="comparison",
            fix="score both on the same samples, in the same order",
        )
    observed = float(_mean_bleu(runs) - _mean_bleu(baseline))
    drawn = _resampled(runs, resamples, seed) - _resampled(baseline, resamples, seed)
    low, high = np.percentile(drawn, [2.5, 97.5])
    extreme = int((np.abs(drawn - drawn.mean()) >= abs(observed)).sum())
    return Difference(observed, float(low), float(high), (extreme + 1) / (resamples + 1))


def _mean_bleu(runs: Counts) -> np.float64:
    return bleu_of(runs.sum(1)).mean()


def _resampled(runs: Counts, resamples: int, seed: int) -> NDArray[np.float64]:
    """Mean BLEU over the runs of every resampled corpus, [R]."""
    sentences = runs.shape[1]
    random = np.random.default_rng(seed)
    times = random.multinomial(sentences, np.full(sentences, 1 / sentences), size=resamples)  # [R, S]
    return np.stack([bleu_of(times @ run) for run in runs]).mean(0)
