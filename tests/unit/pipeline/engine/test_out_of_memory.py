"""A rank without memory says where, what is largest and what to change, once; other errors pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.load import load_recipe
from pipeline.config.resolve import resolve
from pipeline.engine import run
from pipeline.engine import trainer as trainers
from pipeline.engine.out_of_memory import is_out_of_memory, named_if_out_of_memory
from pipeline.engine.state import TrainState
from pipeline.engine.trainer import Trainer
from pipeline.errors import EXIT_USER, OutOfMemoryError
from tests.source_tree import ROOT
from tests.unit.pipeline.config.recipes import CONNECTOR, PRETRAINING, write
from tests.unit.pipeline.models.tiny import bpe_tokenizer

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.02 GiB is free."
)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError(CUDA), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 40 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_about_memory(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


def _resolved(folder: Path) -> Any:
    bpe_tokenizer(folder)
    return resolve(load_recipe(write(folder, PRETRAINING), [f"model.llm.tokenizer={folder}"]), 2)


def _failing_step(resolved: Any, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 8 of a run whose stage fails in its loss."""

    def loss(*_: object) -> None:
        raise error

    monkeypatch.setattr(trainers, "accumulate", loss)
    engine = SimpleNamespace(set_learning_rate=lambda step: 0.1)
    training: Any = SimpleNamespace(
        resolved=resolved, state=TrainState(step=7), engine=engine, stage=None, device=torch.device("cpu")
    )
    Trainer(training, [], [])._step(SimpleNamespace(), [], SimpleNamespace(normaliser=None))  # type: ignore[arg-type]


def test_a_step_without_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfMemoryError) as raised:
        _failing_step(_resolved(tmp_path), torch.OutOfMemoryError(CUDA), monkeypatch)
    text = str(raised.value)
    assert text.startswith(
        "step 8 of the continued_pretraining stage ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)."
        " The planner counts 0.0"
    )
    assert "most in backward: activations of the LLM 0.0" in text and "(512 tokens, all layers kept)" in text
    assert "Change model.gradient_checkpointing, train.micro_batch, data.block_tokens" in text
    assert raised.value.exit_code == EXIT_USER and raised.value.__cause__ is None


def test_another_error_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        _failing_step(None, RuntimeError("shapes"), monkeypatch)


def test_a_plan_that_cannot_be_made_does_not_hide_the_error(tmp_path: Path) -> None:
    resolved = resolve(load_recipe(write(tmp_path, CONNECTOR)), 2)
    with (
        pytest.raises(
            OutOfMemoryError, match=r"\(MemoryError\)\. The memory planner has no answer here: model\.visual"
        ),
        named_if_out_of_memory(resolved, "step 1"),
    ):
        raise MemoryError


@pytest.mark.parametrize("at", ["the start", "an evaluation or a save"])
def test_the_rest_of_a_run(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError(CUDA)

    resolved = _resolved(tmp_path)
    training = SimpleNamespace(state=TrainState())
    monkeypatch.setattr(run, "setup_logging", lambda *_: None)
    monkeypatch.setattr(run, "prepare", fail if at == "the start" else lambda *_: training)
    monkeypatch.setattr(run, "Trainer", lambda *_: SimpleNamespace(fit=fail))
    monkeypatch.setattr(run, "observers_of", lambda _: [])
    monkeypatch.setattr(run, "sinks_of", lambda _: [])
    with pytest.raises(OutOfMemoryError, match=f"^{at} of the continued_pretraining stage ran out of memory"):
        run.train(resolved, run.dist.Ranks(0, 0, 1), None, None)  # type: ignore[arg-type]


def test_a_host_that_really_has_no_memory(tmp_path: Path) -> None:
    """A process that may take no more address space, and a plan made in it."""
    _resolved(tmp_path)
    program = f"""
import resource, torch
from pathlib import Path
from pipeline.config.load import load_recipe
from pipeline.config.resolve import resolve
from pipeline.engine.out_of_memory import named_if_out_of_memory
resolved = resolve(load_recipe({str(tmp_path / "recipe.yaml")!r}, ["model.llm.tokenizer={tmp_path}"]), 2)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
with named_if_out_of_memory(resolved, "step 3"):
    torch.empty(2**30, dtype=torch.float64)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert "OutOfMemoryError: step 3 of the continued_pretraining stage ran out of memory" in last, done.stderr
    assert "can't allocate memory: you tried to allocate 8589934592 bytes" in last and "The planner counts" in last
