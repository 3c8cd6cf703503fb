from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config.load import load_recipe
from pipeline.config.widths import widest
from tests.unit.pipeline.config.recipes import CONNECTOR, CONTRASTIVE, PRETRAINING, write


def _config(folder: Path, **content: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_the_widest_model_of_the_stage(tmp_path: Path) -> None:
    llm = _config(tmp_path / "llm", text_config={"hidden_size": 1536})
    visual = _config(tmp_path / "visual", width=512, backbone_config={"hidden_sizes": [96, 768]})
    sets = [f"model.llm.path={llm}", f"model.visual.path={visual}"]
    assert widest(load_recipe(write(tmp_path, CONNECTOR), sets)) == 1536
    assert widest(load_recipe(write(tmp_path, CONNECTOR), sets[1:])) == 768
    assert widest(load_recipe(write(tmp_path, CONTRASTIVE))) == 128  # its own width; the tiny backbone has 96
    assert widest(load_recipe(write(tmp_path, PRETRAINING))) == 64


def test_configs_that_are_not_here(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text("{")
    for path in (tmp_path / "llm", "nobody/has-this-model", "not a hub id: $"):
        recipe = load_recipe(write(tmp_path, CONNECTOR))
        llm = recipe.model.llm.model_copy(update={"path": str(path)})
        assert widest(recipe.model_copy(update={"model": recipe.model.model_copy(update={"llm": llm})})) is None
