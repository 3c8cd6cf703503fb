"""Features of a frozen text encoder, computed once and kept on disk for all ranks and their loader workers.

A folder per encoder fingerprint holds *parts*. A part is complete or absent (written aside, synced, renamed)::

    <dir>/<fingerprint>/<part>/index.json    counts, widths, and the moments of all features
                              /hashes.i64    [n] text hashes, sorted
                              /starts.i64    [n + 1] first token of every text
                              /sentence.f32  [n, E]
                              /tokens.f32    [sum of tokens, D]

Another encoder, option or set of weights has another fingerprint and never reads these files. Whatever the number of
texts, a process holds only what it asks for: texts are found in the sorted hashes, which are mapped, and features are
read by place. Statistics come from the moments, so that nobody reads a whole cache.

Legend: B texts, N tokens of all of them, D width of the token features, E width of the sentence feature.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.models.text_encoder import TextEncoder
from shards.atomic import write_atomic

log = logging.getLogger(__name__)

INDEX_NAME, HASHES_NAME, STARTS_NAME = "index.json", "hashes.i64", "starts.i64"
SENTENCE_NAME, TOKENS_NAME = "sentence.f32", "tokens.f32"
TEXTS_PER_WRITE = 512
"""Texts whose features are in memory at once."""


class CachedFeatures(NamedTuple):
    """Float32 features of some texts."""

    text_BD: Tensor
    """Sentence features [B, E]."""
    tokens_ND: Tensor
    """Token features, one text after another."""
    lengths: list[int]
    """Tokens of every text."""


class TextFeatureCache:
    """Text hash (`shards.schema.text_hash`) -> cached features. Pickled, it takes its place along, not its files.

    Args:
        dir: shared by all ranks of the run.
    """

    def __init__(self, dir: Path) -> None:
        self.dir = Path(dir)
        self.folder: Path | None = None
        """Of the encoder, once `build` has been called."""
        self._files: list[_Part] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def build(
        self,
        texts: pa.Table,
        encoder: TextEncoder,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] | None = None,
    ) -> None:
        """Encodes the texts that are not cached yet, each rank its share.

        All ranks call it with the same texts; ``barrier`` makes them wait for each other. Texts that fold to one hash
        (case, spaces) share the features of the first in sorted order.

        Args:
            texts: columns ``text`` and ``text_hash``.

        Raises:
            DataError: features are missing afterwards: the ranks do not share ``dir``.
        """
        wait = barrier or (lambda: None)
        self.folder, self._files = self.dir / encoder.fingerprint[:32], None
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0 and (earlier := list(self.folder.glob("part-*"))):
            log.warning(
                "%s holds text features in the form of an earlier version (%s, ...): they are not read, and texts are "
                "encoded again; delete them to free their space", self.folder, earlier[0].name
            )  # fmt: skip
        if rank == 0:
            for leftover in self.folder.glob("tmp-*"):  # of a killed run: large, and nobody finishes it
                shutil.rmtree(leftover)
        hashes = np.unique(texts["text_hash"].to_numpy())
        missing = hashes[~self._found(hashes)]
        wait()  # no rank writes before all have listed: their shares come from the same list
        share = missing[rank::world_size]
        if len(share):
            log.info("encoding %d of %d texts for %s", len(share), len(hashes), self.folder)
            _write_part(self.folder, share, _first_texts(texts, share), encoder)
        wait()
        self._files = None
        if absent := int((~self._found(hashes)).sum()):
            raise DataError(
                f"{absent} of {len(hashes)} texts have no cached features after every rank wrote its share",
                where=str(self.folder),
                fix="put run_dir on a file system that all hosts share",
            )

    def first(self, count: int) -> list[int]:
        """The lowest text hashes in the cache."""
        lowest = np.concatenate([part.hashes[:count] for part in self._opened()])
        return np.unique(lowest)[:count].tolist()

    def statistics(self) -> dict[str, Tensor]:
        """Mean [D] and scale [1] of sentence and token features over the whole cache.

        Features of large text encoders crowd around a common mean (unrelated sentences of multilingual-e5 have
        cosines above 0.7), so contrastive training starts from centred ones.
        """
        found: dict[str, Tensor] = {}
        for name in ("sentence", "tokens"):
            moments = _Moments()
            for part in self._opened():
                moments.merge(_Moments.of(part.index[name]))
            found |= moments.statistics(name)
        return found

    def lookup(self, hashes: Sequence[int]) -> CachedFeatures:
        """Cached features of these texts, in their order.

        Raises:
            DataError: a text was never encoded, or files have become shorter.
        """
        wanted_B = np.asarray(hashes, dtype=np.int64)
        parts = self._opened()
        part_B, row_B = np.full(len(wanted_B), -1), np.zeros(len(wanted_B), dtype=np.int64)
        for number, part in enumerate(parts):
            rows = part.rows(wanted_B)
            part_B[rows >= 0], row_B[rows >= 0] = number, rows[rows >= 0]
        if (part_B < 0).any():
            raise DataError(
                f"no cached features for text hash {wanted_B[part_B < 0][0]}",
                where=str(self.dir),
                fix="the cache covers the texts given to build(); build it from the shards that are being read",
            )
        places = [(parts[number], int(row)) for number, row in zip(part_B, row_B, strict=True)]
        lengths = [part.tokens(row)[1] for part, row in places]
        text_BD = np.empty((len(places), parts[0].index["width"]), np.float32)
        tokens_ND = np.empty((sum(lengths), parts[0].index["token_width"]), np.float32)
        end = 0
        for at, (part, row) in enumerate(places):
            first, length = part.tokens(row)
            part.read(SENTENCE_NAME, row, text_BD[at : at + 1])
            part.read(TOKENS_NAME, first, tokens_ND[end : end + length])
            end += length
        return CachedFeatures(torch.from_numpy(text_BD), torch.from_numpy(tokens_ND), lengths)

    def _found(self, hashes: np.ndarray) -> np.ndarray:
        found = np.zeros(len(hashes), dtype=bool)
        for part in self._opened():
            found |= part.rows(hashes) >= 0
        return found

    def _opened(self) -> list[_Part]:
        assert self.folder is not None  # build() comes first
        if self._files is None:
            self._files = [_Part(path.parent) for path in sorted(self.folder.glob(f"texts-*/{INDEX_NAME}"))]
        return self._files


def _first_texts(texts: pa.Table, hashes: np.ndarray) -> pa.ChunkedArray:
    """Of every hash the first of its texts in sorted order."""
    chosen = texts.filter(pc.is_in(texts["text_hash"], value_set=pa.array(hashes)))
    chosen = chosen.sort_by([("text_hash", "ascending"), ("text", "ascending")])
    return chosen["text"].take(pa.array(np.searchsorted(chosen["text_hash"].to_numpy(), hashes)))


class _Moments:
    """Mean and squared deviations of rows that come in pieces (Chan, Golub and LeVeque 1983), in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_D: np.ndarray | float = 0.0
        self.squares_D: np.ndarray | float = 0.0

    @classmethod
    def of(cls, record: dict[str, Any]) -> _Moments:
        moments = cls()
        moments.count = record["count"]
        moments.mean_D, moments.squares_D = (np.array(record[name]) for name in ("mean", "squares"))
        return moments

    def record(self) -> dict[str, Any]:
        """For JSON, which keeps every digit."""
        sums = {"mean": np.asarray(self.mean_D), "squares": np.asarray(self.squares_D)}
        return {"count": self.count} | {name: value_D.tolist() for name, value_D in sums.items()}

    def add(self, rows_ND: np.ndarray) -> None:
        """More rows, of any precision."""
        piece = _Moments()
        piece.count, piece.mean_D = len(rows_ND), rows_ND.mean(0, dtype=np.float64)
        piece.squares_D = np.square(rows_ND - piece.mean_D).sum(0)
        self.merge(piece)

    def merge(self, more: _Moments) -> None:
        """The rows of another one, at least one."""
        step_D, whole = more.mean_D - self.mean_D, self.count + more.count
        self.squares_D = self.squares_D + more.squares_D + step_D**2 * (self.count * more.count / whole)
        self.mean_D = self.mean_D + step_D * (more.count / whole)
        self.count = whole

    def statistics(self, name: str) -> dict[str, Tensor]:
        """``NAME_mean`` [D], and ``NAME_scale`` [1]: one over the deviation of a single number."""
        deviation = float(np.sqrt(np.mean(self.squares_D) / self.count))
        return {
            f"{name}_mean": torch.from_numpy(np.asarray(self.mean_D, dtype=np.float32)),
            f"{name}_scale": torch.tensor([1.0 / max(deviation, 1e-12)]),
        }


class _Part:
    """One complete part."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: dict[str, Any] = json.loads((path / INDEX_NAME).read_text())
        texts, tokens = self.index["sentence"]["count"], self.index["tokens"]["count"]
        self._widths = {SENTENCE_NAME: self.index["width"], TOKENS_NAME: self.index["token_width"]}
        sizes = {HASHES_NAME: 8 * texts, STARTS_NAME: 8 * (texts + 1)}
        sizes |= {SENTENCE_NAME: 4 * texts * self.index["width"], TOKENS_NAME: 4 * tokens * self.index["token_width"]}
        for name, expected in sizes.items():
            if (size := (path / name).stat().st_size) != expected:
                raise self._damaged(f"{size} bytes, the index promises {expected}", name)
        self.hashes = np.memmap(path / HASHES_NAME, np.int64, "r")
        self._starts = np.memmap(path / STARTS_NAME, np.int64, "r")
        self._handles: dict[str, IO[bytes]] = {}

    def rows(self, hashes: np.ndarray) -> np.ndarray:
        """The row of every hash; -1 where it is not here."""
        rows = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        return np.where(self.hashes[rows] == hashes, rows, -1)

    def tokens(self, row: int) -> tuple[int, int]:
        """First token and number of tokens of a text."""
        return int(self._starts[row]), int(self._starts[row + 1] - self._starts[row])

    def read(self, name: str, row: int, into: np.ndarray) -> None:
        """Rows of a feature file from ``row`` on. Read, not mapped: pages of a mapping would stay in the process."""
        if name not in self._handles:
            self._handles[name] = (self.path / name).open("rb", buffering=0)
        if os.preadv(self._handles[name].fileno(), [into.data], 4 * row * self._widths[name]) != into.nbytes:
            raise self._damaged(f"ends before row {row + len(into)}", name)

    def _damaged(self, what: str, name: str) -> DataError:
        return DataError(
            what, where=str(self.path / name), fix=f"delete {self.path}; its texts are encoded again by the next run"
        )


def _write_part(folder: Path, hashes: np.ndarray, texts: pa.ChunkedArray, encoder: TextEncoder) -> None:
    """Encodes one rank's share piece by piece into a separate folder, then renames it into place."""
    name = hashlib.sha256(hashes.tobytes()).hexdigest()[:16]
    temporary = folder / f"tmp-{name}-{os.getpid()}"
    temporary.mkdir()
    try:
        counts: list[int] = []
        moments = {"sentence": _Moments(), "tokens": _Moments()}
        with (temporary / SENTENCE_NAME).open("wb") as sentence, (temporary / TOKENS_NAME).open("wb") as tokens:
            for start in range(0, len(texts), TEXTS_PER_WRITE):
                features = encoder.encode(texts.slice(start, TEXTS_PER_WRITE).to_pylist())
                text_BD, tokens_ND = features.sentence.numpy(), torch.cat(features.tokens).numpy()
                for file, rows, moment in ((sentence, text_BD, "sentence"), (tokens, tokens_ND, "tokens")):
                    file.write(rows.tobytes())
                    moments[moment].add(rows)
                counts += [len(rows) for rows in features.tokens]
            for file in (sentence, tokens):
                file.flush()
                os.fsync(file.fileno())
        index = {"width": text_BD.shape[1], "token_width": tokens_ND.shape[1]}
        write_atomic(temporary / HASHES_NAME, hashes.tobytes())
        write_atomic(temporary / STARTS_NAME, np.cumsum([0, *counts], dtype=np.int64).tobytes())
        content = index | {name: moment.record() for name, moment in moments.items()}
        write_atomic(temporary / INDEX_NAME, json.dumps(content))
        temporary.rename(folder / f"texts-{name}")
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
