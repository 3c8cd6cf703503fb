from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import CheckpointError, DataError
from pipeline.evaluate.recognise import GlossReader, Recognised, write_recognised


def test_a_folder_that_is_no_contrastive_export(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no heads\.safetensors; give what `slt export` wrote"):
        GlossReader(tmp_path)


def test_an_export_without_glosses(tmp_path: Path) -> None:
    (tmp_path / "heads.safetensors").touch()
    with pytest.raises(DataError, match="no gloss vocabulary"):
        GlossReader(tmp_path)


def test_the_table(tmp_path: Path) -> None:
    write_recognised(tmp_path / "made" / "dev.tsv", [Recognised("tiny", "7", "A B", "A")])
    text = (tmp_path / "made" / "dev.tsv").read_text(encoding="utf-8")
    assert text == "corpus\tsample_id\thypothesis\treference\ntiny\t7\tA B\tA\n"
