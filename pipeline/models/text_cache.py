"""Features of a frozen text encoder, computed once and kept on disk, memory-mapped and shared by all ranks.

A folder per encoder fingerprint holds *parts*. A part is complete or absent (written aside, synced, renamed)::

    <dir>/<fingerprint>/<part>/index.json    {"width": E, "token_width": D, "hashes": [...], "counts": [...]}
                              /sentence.f32  [n, E]
                              /tokens.f32    [sum of counts, D]

Another encoder, option or set of weights has another fingerprint and never reads these files.

Legend: B texts, L text tokens, D width of the token features, E width of the sentence feature.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.models.text_encoder import TextEncoder
from shards.schema import text_hash

log = logging.getLogger(__name__)

INDEX_NAME, SENTENCE_NAME, TOKENS_NAME = "index.json", "sentence.f32", "tokens.f32"
TEXTS_PER_WRITE = 4096
"""Texts whose features are in memory at once."""
STATISTICS_BYTES = 16 << 20
"""Float64 numbers `TextFeatureCache.statistics` reads at once; memory holds about three times as many."""


class TextFeatureCache:
    """Text hash (`shards.schema.text_hash`) -> cached features. Float32.

    Args:
        dir: shared by all ranks of the run.
    """

    def __init__(self, dir: Path) -> None:
        self.dir = Path(dir)
        self._rows: dict[int, tuple[_Part, int]] = {}

    def build(
        self,
        texts: Sequence[str],
        encoder: TextEncoder,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] | None = None,
    ) -> None:
        """Encodes the texts that are not cached yet, each rank its share, then opens the cache on every rank.

        All ranks call it with the same texts; ``barrier`` makes them wait for each other. Texts that fold to one hash
        (case, spaces) share the features of the first in sorted order.

        Raises:
            DataError: features are missing afterwards: the ranks do not share ``dir``.
        """
        wait = barrier or (lambda: None)
        folder = self.dir / encoder.fingerprint[:32]
        folder.mkdir(parents=True, exist_ok=True)
        text_of_hash: dict[int, str] = {}
        for text in sorted(texts):
            text_of_hash.setdefault(text_hash(text), text)
        self._open(folder)
        missing = sorted(hash_ for hash_ in text_of_hash if hash_ not in self._rows)
        wait()  # no rank writes before all have listed: their shares come from the same list
        share = missing[rank::world_size]
        if share:
            log.info("encoding %d of %d texts for %s", len(share), len(text_of_hash), folder)
            _write_part(folder, share, [text_of_hash[hash_] for hash_ in share], encoder)
        wait()
        self._open(folder)
        if absent := [hash_ for hash_ in text_of_hash if hash_ not in self._rows]:
            raise DataError(
                f"{len(absent)} of {len(text_of_hash)} texts have no cached features after every rank wrote its share",
                where=str(folder),
                fix="put run_dir on a file system that all hosts share",
            )

    def hashes(self) -> list[int]:
        """Every text hash in the cache, sorted."""
        return sorted(self._rows)

    def statistics(self) -> dict[str, Tensor]:
        """Mean [D] and scale [1] of sentence and token features over the whole cache.

        Features of large text encoders crowd around a common mean (unrelated sentences of multilingual-e5 have
        cosines above 0.7), so contrastive training starts from centred ones. Read piece by piece: memory does not grow
        with the cache.
        """
        rows_of: dict[_Part, list[int]] = {}
        for part, row in self._rows.values():
            rows_of.setdefault(part, []).append(row)
        sentence, tokens = _Moments(), _Moments()
        for part, rows in rows_of.items():
            used = np.zeros(len(part.hashes), dtype=bool)  # another part may hold the same text
            used[rows] = True
            for start, rows_ND in _pieces(part.path / SENTENCE_NAME, part.sentence.shape[1]):
                sentence.add(rows_ND[used[start : start + len(rows_ND)]])
            for _, rows_ND in _pieces(part.path / TOKENS_NAME, part.tokens.shape[1]):
                tokens.add(rows_ND)
        return {**sentence.statistics("sentence"), **tokens.statistics("tokens")}

    def lookup(self, hashes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Cached features: sentence_BE, tokens_BLD padded with zeros, and mask_BL (True = a token).

        Raises:
            DataError: a text was never encoded.
        """
        rows = []
        for hash_ in hashes:
            if hash_ not in self._rows:
                raise DataError(
                    f"no cached features for text hash {hash_}",
                    where=str(self.dir),
                    fix="the cache covers the texts given to build(); build it from the shards that are being read",
                )
            part, row = self._rows[hash_]
            rows.append((part.sentence[row], part.tokens[part.starts[row] : part.starts[row + 1]]))
        sentence_BE = torch.from_numpy(np.stack([sentence for sentence, _ in rows]))
        tokens = [torch.from_numpy(np.array(tokens_LD)) for _, tokens_LD in rows]
        tokens_BLD = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        count_B = torch.tensor([len(tokens_LD) for tokens_LD in tokens])
        return sentence_BE, tokens_BLD, torch.arange(tokens_BLD.shape[1])[None, :] < count_B[:, None]

    def _open(self, folder: Path) -> None:
        folders = sorted(path.parent for path in folder.glob(f"part-*/{INDEX_NAME}"))
        self._rows = {}
        for part in (_Part(path) for path in folders):
            for row, hash_ in enumerate(part.hashes):
                self._rows.setdefault(hash_, (part, row))


def _pieces(path: Path, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of a float32 file as float64 [n, width], with the number of the first one. Read, not mapped: pages of a
    mapping would stay in the process's memory."""
    count = max(1, STATISTICS_BYTES // (8 * width))
    with path.open("rb") as file:
        start = 0
        while len(piece := np.fromfile(file, np.float32, count * width)):
            rows_ND = piece.reshape(-1, width).astype(np.float64)
            yield start, rows_ND
            start += len(rows_ND)


class _Moments:
    """Mean and squared deviations of rows that come in pieces (Chan, Golub and LeVeque 1983), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_D: np.ndarray | float = 0.0
        self.squares_D: np.ndarray | float = 0.0

    def add(self, rows_ND: np.ndarray) -> None:
        """``rows_ND`` is used up."""
        if not len(rows_ND):
            return
        mean_D = rows_ND.mean(0)
        rows_ND -= mean_D
        np.square(rows_ND, out=rows_ND)
        step_D, whole = mean_D - self.mean_D, self.count + len(rows_ND)
        self.squares_D = self.squares_D + rows_ND.sum(0) + step_D**2 * (self.count * len(rows_ND) / whole)
        self.mean_D = self.mean_D + step_D * (len(rows_ND) / whole)
        self.count = whole

    def statistics(self, name: str) -> dict[str, Tensor]:
        """``NAME_mean`` [D], and ``NAME_scale`` [1]: one over the deviation of a single number."""
        deviation = float(np.sqrt(np.mean(self.squares_D) / self.count))
        return {
            f"{name}_mean": torch.from_numpy(np.asarray(self.mean_D, dtype=np.float32)),
            f"{name}_scale": torch.tensor([1.0 / max(deviation, 1e-12)]),
        }


class _Part:
    """One complete part, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        index = json.loads((path / INDEX_NAME).read_text())
        self.hashes: list[int] = index["hashes"]
        self.starts = np.concatenate(([0], np.cumsum(index["counts"], dtype=np.int64)))
        tokens = int(self.starts[-1])
        shapes = {SENTENCE_NAME: (len(self.hashes), index["width"]), TOKENS_NAME: (tokens, index["token_width"])}
        for name, (rows, width) in shapes.items():
            size, expected = (path / name).stat().st_size, rows * width * 4
            if size != expected:
                raise DataError(
                    f"{size} bytes, the index promises {expected}",
                    where=str(path / name),
                    fix=f"delete {path}; its texts are encoded again",
                )
        self.sentence = np.memmap(path / SENTENCE_NAME, np.float32, "r", shape=shapes[SENTENCE_NAME])
        self.tokens = np.memmap(path / TOKENS_NAME, np.float32, "r", shape=shapes[TOKENS_NAME])


def _write_part(folder: Path, hashes: list[int], texts: list[str], encoder: TextEncoder) -> None:
    """Encodes one rank's share piece by piece into a separate folder, then renames it into place."""
    name = hashlib.sha256(np.array(hashes, dtype=np.int64).tobytes()).hexdigest()[:16]
    final = folder / f"part-{name}"
    temporary = folder / f"tmp-{name}-{os.getpid()}"
    temporary.mkdir()
    try:
        counts: list[int] = []
        with (temporary / SENTENCE_NAME).open("wb") as sentence, (temporary / TOKENS_NAME).open("wb") as tokens:
            for start in range(0, len(texts), TEXTS_PER_WRITE):
                features = encoder.encode(texts[start : start + TEXTS_PER_WRITE])
                sentence.write(features.sentence.numpy().tobytes())
                tokens.write(torch.cat(features.tokens).numpy().tobytes())
                counts += [len(rows) for rows in features.tokens]
            for file in (sentence, tokens):
                file.flush()
                os.fsync(file.fileno())
        widths = {"width": features.sentence.shape[1], "token_width": features.tokens[0].shape[1]}
        with (temporary / INDEX_NAME).open("w") as index:
            json.dump({**widths, "hashes": hashes, "counts": counts}, index)
            index.flush()
            os.fsync(index.fileno())
        temporary.rename(final)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
