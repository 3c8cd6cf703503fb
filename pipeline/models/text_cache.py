"""Features of a frozen text encoder, computed once and kept on disk, memory-mapped and shared by all ranks.

A folder per encoder fingerprint holds *parts*. A part is complete or absent (written aside, synced, renamed)::

    <dir>/<fingerprint>/<part>/index.json    {"width": E, "token_width": D, "hashes": [...], "counts": [...]}
                              /sentence.f32  [n, E]
                              /tokens.f32    [sum of counts, D]

Another encoder, option or set of weights has another fingerprint and never meets these files.

Legend: B texts, L text tokens, D width of the token features, E width of the sentence feature.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
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
            DataError: features are missing afterwards, which means that the ranks do not share ``dir``.
        """
        wait = barrier or (lambda: None)
        folder = self.dir / encoder.fingerprint[:32]
        folder.mkdir(parents=True, exist_ok=True)
        wanted: dict[int, str] = {}
        for text in sorted(texts):
            wanted.setdefault(text_hash(text), text)
        self._open(folder)
        missing = sorted(hash_ for hash_ in wanted if hash_ not in self._rows)
        wait()  # nobody writes before everybody has listed: shares are cut from one and the same list
        share = missing[rank::world_size]
        if share:
            log.info("encoding %d of %d texts for %s", len(share), len(wanted), folder)
            _write_part(folder, share, [wanted[hash_] for hash_ in share], encoder)
        wait()
        self._open(folder)
        if absent := [hash_ for hash_ in wanted if hash_ not in self._rows]:
            raise DataError(
                f"{len(absent)} of {len(wanted)} texts have no cached features after every rank wrote its share",
                where=str(folder),
                fix="put run_dir on a file system that all hosts share",
            )

    def hashes(self) -> list[int]:
        """Every text hash in the cache, sorted."""
        return sorted(self._rows)

    def statistics(self) -> dict[str, Tensor]:
        """Mean [D] and scale [1] of sentence and token features over the whole cache.

        Features of large text encoders crowd around a common mean (unrelated sentences of multilingual-e5 have
        cosines above 0.7), so contrastive training starts from centred ones.
        """
        sentence = np.stack([self._rows[hash_][0].sentence[self._rows[hash_][1]] for hash_ in self.hashes()])
        tokens = np.concatenate([part.tokens for part in {id(p): p for p, _ in self._rows.values()}.values()])
        found = {}
        for name, rows in (("sentence", sentence), ("tokens", tokens)):
            mean = rows.mean(0, dtype=np.float64)
            found[f"{name}_mean"] = torch.from_numpy(mean.astype(np.float32))
            deviation = float(np.sqrt(np.mean((rows - mean) ** 2, dtype=np.float64)))
            found[f"{name}_scale"] = torch.tensor([1.0 / max(deviation, 1e-12)])
        return found

    def lookup(self, hashes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Cached features: sentence_BE, tokens_BLD padded with zeros, and mask_BL (True = a token).

        Raises:
            DataError: a text was never encoded.
        """
        found = []
        for hash_ in hashes:
            if hash_ not in self._rows:
                raise DataError(
                    f"no cached features for text hash {hash_}",
                    where=str(self.dir),
                    fix="the cache covers the texts given to build(); build it from the shards that are being read",
                )
            part, row = self._rows[hash_]
            found.append((part.sentence[row], part.tokens[part.starts[row] : part.starts[row + 1]]))
        sentence_BE = torch.from_numpy(np.stack([sentence for sentence, _ in found]))
        tokens = [torch.from_numpy(np.array(rows)) for _, rows in found]
        tokens_BLD = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        count_B = torch.tensor([len(rows) for rows in tokens])
        return sentence_BE, tokens_BLD, torch.arange(tokens_BLD.shape[1])[None, :] < count_B[:, None]

    def _open(self, folder: Path) -> None:
        parts = sorted(path.parent for path in folder.glob(f"part-*/{INDEX_NAME}"))
        self._rows = {}
        for part in (_Part(path) for path in parts):
            for row, hash_ in enumerate(part.hashes):
                self._rows.setdefault(hash_, (part, row))


class _Part:
    """One complete part, memory-mapped."""

    def __init__(self, path: Path) -> None:
        index = json.loads((path / INDEX_NAME).read_text())
        self.hashes: list[int] = index["hashes"]
        self.starts = np.concatenate(([0], np.cumsum(index["counts"], dtype=np.int64)))
        tokens = int(self.starts[-1])
        shapes = {SENTENCE_NAME: (len(self.hashes), index["width"]), TOKENS_NAME: (tokens, index["token_width"])}
        for name, (rows, width) in shapes.items():
            found, expected = (path / name).stat().st_size, rows * width * 4
            if found != expected:
                raise DataError(
                    f"{found} bytes, the index promises {expected}",
                    where=str(path / name),
                    fix=f"delete {path}; its texts are encoded again",
                )
        self.sentence = np.memmap(path / SENTENCE_NAME, np.float32, "r", shape=shapes[SENTENCE_NAME])
        self.tokens = np.memmap(path / TOKENS_NAME, np.float32, "r", shape=shapes[TOKENS_NAME])


def _write_part(folder: Path, hashes: list[int], texts: list[str], encoder: TextEncoder) -> None:
    """Encodes one rank's share piece by piece into a folder of its own, then renames it into place."""
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
