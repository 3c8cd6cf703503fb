from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError
from pipeline.models.gloss_vocabulary import GlossVocabulary


def test_the_order_does_not_depend_on_the_samples() -> None:
    texts = ["RAIN NORTH", "  SUN  NORTH ", "", "SUN NORTH"]
    found = GlossVocabulary.of(texts)
    assert found == GlossVocabulary.of(reversed(texts)) and found.glosses == ("NORTH", "SUN", "RAIN")
    assert len(found) == 4 and found.classes(["RAIN", "NORTH"]) == [3, 1]


def test_saved_and_loaded(tmp_path: Path) -> None:
    vocabulary = GlossVocabulary(("ÜBER", "SUN"))
    vocabulary.save(tmp_path)
    assert GlossVocabulary.load(tmp_path) == vocabulary
    assert "ÜBER" in (tmp_path / "glosses.json").read_text(encoding="utf-8")


def test_a_folder_without(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no gloss vocabulary.*contrastive\.ctc\.weight"):
        GlossVocabulary.load(tmp_path)


def test_the_best_path() -> None:
    """Equal neighbours are one gloss, equal glosses with a blank between are two, and clips do not mix."""
    best = [1, 1, 0, 1, 2, 2, 0, 0, 0]
    logits_MV = torch.nn.functional.one_hot(torch.tensor(best), 3).float()
    assert GlossVocabulary(("A", "B")).decode(logits_MV, [5, 3, 1]) == [["A", "A", "B"], ["B"], []]
