"""An experiment whose commands are played by a function."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.source import dump_yaml
from pipeline.evaluate.protocols import get_protocol
from pipeline.evaluate.report import write_predictions
from pipeline.experiment.matrix import Matrix, read_matrix
from pipeline.inference.generate import Prediction

REFERENCES = [f"der wind weht {word} im norden und sueden ." for word in ("schwach", "stark", "nicht", "oft")] * 5


@dataclass
class Commands:
    """Stands for `slt`: leaves what its commands leave, or an exit code."""

    codes: dict[str, int] = field(default_factory=dict)
    """Part of a command line -> the exit code it ends with."""
    lines: list[str] = field(default_factory=list)
    """What was run."""
    quality: Callable[[str], int] = lambda line: 0
    """Of an evaluated export: how many of the 20 translations are right."""

    def __call__(self, arguments: Sequence[str]) -> int:
        line = " ".join(arguments)
        self.lines.append(line)
        for part, code in self.codes.items():
            if part in line:
                return code
        if arguments[0] == "launch":
            folder = Path(next(word for word in arguments if word.startswith("run_dir=")).removeprefix("run_dir="))
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 10}) + "\n")
            (folder / "ds_config.resolved.json").write_text(json.dumps({"train_batch_size": 4}))
            row = {"phases": {"step": 8.0 if "warmup_steps=7" in line else 6.0}, "steps": 10, "undone_steps": 0,
                   "repeated_steps": 0, "started": 0.0, "updated": 9.0}  # fmt: skip
            (folder / "goodput.jsonl").write_text(json.dumps(row) + "\n")
        elif arguments[0] == "export":
            export = Path(arguments[3])
            export.mkdir()
            (export / "provenance.json").write_text(json.dumps({"step": 10, "metrics": {"eval/loss": 0.5}}))
        else:
            right, out = self.quality(line), Path(arguments[arguments.index("--out") + 1])
            texts = [text if number < right else "regen" for number, text in enumerate(REFERENCES)]
            rows = [
                Prediction("c", f"{n:02}", "test", "s", reference, text)
                for n, (reference, text) in enumerate(zip(REFERENCES, texts, strict=True))
            ]
            write_predictions(out, rows, get_protocol("default"))
            (out / "scores.json").write_text("{}")
        return 0


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """Two steps, one axis of two values that changes the second."""
    return {
        "name": "warm-up",
        "out": str(tmp_path / "out"),
        "seeds": [0, 1],
        "steps": [
            {"name": "encoder", "recipe": "demo_contrastive"},
            {"name": "translator", "recipe": "demo_connector", "set": {"model.visual.path": "{encoder}"}},
        ],
        "axes": {"warmup": {"short": {}, "long": {"translator": {"train.optimizer.warmup_steps": 7}}}},
        "scores": [
            {"name": "test", "shards": "data/video"},
            {"name": "loss", "step": "encoder", "metric": "eval/loss"},
        ],
        "launch": {"num_procs": 2, "accelerator": "cpu"},
        "compute": {"measure": "seconds", "within": 0.05},
    }


@pytest.fixture
def read(tmp_path: Path) -> Callable[[dict[str, Any]], Matrix]:
    """Writes content to a file and reads it."""

    def read(content: dict[str, Any]) -> Matrix:
        path = tmp_path / "matrix.yaml"
        path.write_text(dump_yaml(content))
        return read_matrix(path)

    return read


@pytest.fixture
def commands() -> Commands:
    return Commands()
