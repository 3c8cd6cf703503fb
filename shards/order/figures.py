"""Figures of a plan: what an epoch gives, how full its packs are, what was left out."""

from __future__ import annotations

from typing import Any

import numpy as np

from shards.order.plan import Plan


def stats(plan: Plan, epoch: int = 0) -> dict[str, float | int]:
    """Counts of an epoch, which is made for it: items, samples (distinct), tokens or frames, utilisation, padding,
    repeated texts, and the samples left out (empty documents, sequences too long)."""
    block = plan.options.block_tokens if plan.options.kind in ("pack", "sequence") else 0
    seen = np.zeros(len(plan.samples), dtype=bool)
    items = held = padded = repeated = 0
    for part in plan.chunks.of_epoch(epoch):
        lengths = part.elements["length"].astype(np.int64)
        longest = np.maximum.reduceat(lengths, part.starts[:-1]) if len(part) else lengths
        padded += len(part) * block if block else int((longest * np.diff(part.starts)).sum())
        seen[part.elements["sample"]] = True
        items, held, repeated = items + len(part), held + int(lengths.sum()), repeated + part.repeated_texts
    return {
        "items": items,
        "samples": int(seen.sum()),
        "tokens" if block else "frames": held,
        "utilisation": held / padded,
        "padding": 1.0 - held / padded,
        "repeated_texts": repeated,
        "left_out": plan.samples.left_out,
    }


def describe(plan: Plan, epoch: int = 0) -> dict[str, Any]:
    """What the plan is, without making any of it: kind, chunks, and what each source gives to an epoch."""
    quotas = plan.mixture.quotas(epoch)
    sources = [
        {
            "shards": str(source.shard_set.dir), "split": source.split, "corpus": source.corpus,
            "weight": source.named_weight(), "samples": count, "epoch_samples": quota,
        }
        for source, count, quota in zip(plan.sources, plan.samples.counts, quotas, strict=True)
    ]  # fmt: skip
    return {
        "kind": plan.options.kind, "samples": len(plan.samples), "epoch_samples": sum(quotas),
        "chunks": plan.chunks.count(epoch), "chunk_samples": plan.chunks.size,
        "left_out": plan.samples.left_out, "fingerprint": plan.fingerprint, "sources": sources,
    }  # fmt: skip
