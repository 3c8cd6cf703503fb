"""What an evaluation writes: the predictions table, merged from the ranks' parts, and the scores file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.evaluate import metrics
from pipeline.evaluate.broadcasts import BroadcastScores
from pipeline.evaluate.metrics import Scores
from pipeline.evaluate.protocols import Protocol, get_protocol
from pipeline.inference.generate import Prediction
from shards.atomic import put_file, write_atomic
from shards.errors import DataError

PREDICTIONS = "predictions.parquet"
TABLE = "predictions.tsv"
SCORES = "scores.json"
_COLUMNS = ("corpus", "sample_id", "split", "signer", "reference", "hypothesis")
_SHOWN = 5
"""Sample ids named in an error."""


def part_path(out_dir: Path, rank: int, world_size: int) -> Path:
    """Where a rank writes its part of the predictions."""
    return out_dir / "parts" / f"predictions-{rank:05d}-of-{world_size:05d}.parquet"


def write_part(out_dir: Path, rank: int, world_size: int, predictions: Sequence[Prediction]) -> Path:
    """Write one rank's predictions (possibly none); the file is complete or absent."""
    path = part_path(out_dir, rank, world_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    put_file(path, lambda target: pq.write_table(_to_table(predictions), target))
    return path


def read_predictions(path: Path) -> list[Prediction]:
    """The predictions of a part or of a merged table, in file order."""
    rows = pq.read_table(path, columns=list(_COLUMNS)).to_pylist()
    return [Prediction(**row) for row in rows]


def merge_predictions(out_dir: Path, world_size: int, expected: Iterable[str]) -> list[Prediction]:
    """Join the parts of all ranks in the order of the expected samples.

    Args:
        out_dir: folder given to `write_part`.
        world_size: number of parts; parts of other world sizes are ignored.
        expected: `Prediction.key` of every sample that must have been translated.

    Raises:
        DataError: a part is missing, a sample occurs twice, or samples are missing or unexpected.
    """
    predictions: list[Prediction] = []
    for rank in range(world_size):
        path = part_path(out_dir, rank, world_size)
        if not path.is_file():
            raise DataError(
                f"rank {rank} of {world_size} left no predictions",
                where=str(path),
                fix="look at that rank's log and run the evaluation again",
            )
        predictions += read_predictions(path)
    order = list(expected)
    by_key = {prediction.key: prediction for prediction in predictions}
    problems = {
        "translated twice": [key for key, count in Counter(p.key for p in predictions).items() if count > 1],
        "in the split twice": [key for key, count in Counter(order).items() if count > 1],
        "not translated": [key for key in order if key not in by_key],
        "not part of the split": sorted(by_key.keys() - set(order)),
    }
    texts = [
        f"{len(keys)} samples {what} ({', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''})"
        for what, keys in problems.items()
        if keys
    ]
    if texts:
        raise DataError(
            "; ".join(texts),
            where=str(out_dir / "parts"),
            fix="every sample of the split must be scored exactly once; delete the folder and evaluate again",
        )
    return [by_key[key] for key in order]


def write_predictions(out_dir: Path, predictions: Sequence[Prediction], protocol: Protocol) -> None:
    """Write ``predictions.parquet`` (exact) and ``predictions.tsv`` (white space folded), each with sentence BLEU."""
    out_dir.mkdir(parents=True, exist_ok=True)
    bleus = [metrics.sentence_bleu(p.hypothesis, [p.reference], protocol) for p in predictions]
    table = _to_table(predictions).append_column("sentence_bleu", pa.array(bleus, pa.float64()))
    put_file(out_dir / PREDICTIONS, lambda target: pq.write_table(table, target))
    lines = ["\t".join((*_COLUMNS, "sentence_bleu"))]
    for prediction, bleu in zip(predictions, bleus, strict=True):
        fields = [" ".join(str(getattr(prediction, name)).split()) for name in _COLUMNS]
        lines.append("\t".join((*fields, f"{bleu:.2f}")))
    write_atomic(out_dir / TABLE, "\n".join(lines) + "\n")


def write_scores(out_dir: Path, scores: Scores, about: Mapping[str, object]) -> Path:
    """Write ``scores.json``: the scores, their protocol in full, versions, and what was evaluated (``about``)."""
    return _write_scores(out_dir, scores.to_dict(), get_protocol(scores.protocol), about)


def write_long_scores(out_dir: Path, scores: BroadcastScores, protocol: Protocol, about: Mapping[str, object]) -> Path:
    """`write_scores` of whole videos."""
    return _write_scores(out_dir, scores.to_dict(), protocol, about)


def _write_scores(out_dir: Path, scores: Mapping[str, object], protocol: Protocol, about: Mapping[str, object]) -> Path:
    out_dir.mkdir(parents=True, exist_ok=True)
    content = {
        "scores": scores,
        "protocol": protocol.to_dict(),
        "versions": metrics.versions(),
        **about,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    path = out_dir / SCORES
    write_atomic(path, text)
    return path


def _to_table(predictions: Sequence[Prediction]) -> pa.Table:
    return pa.table({name: pa.array([getattr(p, name) for p in predictions], pa.string()) for name in _COLUMNS})
