"""The glosses that a gloss head tells apart, by number.

Legend: V classes (0 is the blank), M packed word tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.losses.gloss import BLANK
from shards.atomic import write_atomic

VOCABULARY_NAME = "glosses.json"


@dataclass(frozen=True)
class GlossVocabulary:
    """Class k is ``glosses[k - 1]``."""

    glosses: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> GlossVocabulary:
        """All glosses of these texts (words between white space), the most frequent first, equal ones by name."""
        counts = Counter(gloss for text in texts for gloss in text.split())
        return cls(tuple(sorted(counts, key=lambda gloss: (-counts[gloss], gloss))))

    @classmethod
    def load(cls, folder: Path) -> GlossVocabulary:
        """Of an export.

        Raises:
            DataError: the folder holds none.
        """
        path = Path(folder) / VOCABULARY_NAME
        if not path.is_file():
            raise DataError(
                "no gloss vocabulary",
                where=str(path),
                fix="give the export of a contrastive run with contrastive.ctc.weight or set_weight above 0",
            )
        return cls(tuple(json.loads(path.read_text(encoding="utf-8"))["glosses"]))

    def save(self, folder: Path) -> None:
        """Write `VOCABULARY_NAME`."""
        content = {"blank": BLANK, "glosses": list(self.glosses)}
        write_atomic(Path(folder) / VOCABULARY_NAME, json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    def __len__(self) -> int:
        """V, the blank included."""
        return len(self.glosses) + 1

    @cached_property
    def _classes(self) -> dict[str, int]:
        return {gloss: number for number, gloss in enumerate(self.glosses, BLANK + 1)}

    def classes(self, glosses: Sequence[str]) -> list[int]:
        """Their numbers. Raises KeyError for a gloss that is not in the vocabulary."""
        return [self._classes[gloss] for gloss in glosses]

    def decode(self, logits_MV: Tensor, lengths: Sequence[int]) -> list[list[str]]:
        """The glosses of every clip by the most probable class of each word token: equal neighbours are one gloss, and
        blanks go (Graves et al. 2006, best path decoding)."""
        best_M: list[int] = logits_MV.argmax(-1).tolist()
        rows = torch.tensor(best_M).split(list(lengths))
        return [[self.glosses[best - 1] for best, _ in groupby(row.tolist()) if best != BLANK] for row in rows]
