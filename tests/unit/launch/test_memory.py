from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import cli, memory
from launch.hostfile import Host
from launch.memory import check_memory, detected_gib, planned_memory, print_memory
from pipeline.config.gpu_memory import gpu_gib
from pipeline.config.planner import Answer, NotPlanned
from pipeline.errors import RecipeError

GIB = 1024**3
LINES = [
    {"item": "weights, trained", "bytes": GIB, "phases": ["backward", "optimizer step"], "rule": "on every rank"},
    {"item": "activations", "bytes": 2 * GIB, "phases": ["backward"], "rule": "8192 tokens"},
]
PLAN = {"lines": LINES, "phase": "backward", "peak_bytes": 3 * GIB, "gpu_gib": 80}


@pytest.mark.parametrize(("text", "gib"), [("80", 80), ("39.5GiB", 39.5), ("24 GB", 24), ("H100", 80), ("l40s", 48)])
def test_sizes_and_names(text: str, gib: float) -> None:
    assert gpu_gib(text) == gib


HOSTS = (Host("localhost", (0, 1)),)


@pytest.mark.parametrize("text", ["0", "much", "-3", ""])
def test_neither_size_nor_name(text: str) -> None:
    with pytest.raises(RecipeError, match="--gpu-memory must be a size such as 80 or 80GiB, or one of v100, a100-40"):
        gpu_gib(text)


def test_the_smallest_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "0, GPU-aa, 81559\n1, GPU-bb, 40960\n2, GPU-cc, 4096\n3, GPU-dd, [N/A]\n"
    answers: list[Any] = [subprocess.CompletedProcess([], 0, listed)] * 3 + [subprocess.CompletedProcess([], 9, "")]

    def run(*args: Any, **kwargs: Any) -> Any:
        if not answers:
            raise FileNotFoundError("nvidia-smi")
        return answers.pop(0)

    monkeypatch.setattr(subprocess, "run", run)
    assert detected_gib((0, 1)) == 40, "the third is for the screen"
    assert detected_gib(("GPU-aa", "GPU-bb")) == 40 and detected_gib(("MIG-x",)) == 4
    assert detected_gib((0,)) is None and detected_gib((0,)) is None


def test_the_table_says_when_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    print_memory(Answer("zero1", "", PLAN, True), 8)
    text = capsys.readouterr().out
    assert "memory of one of 8 ranks" in text and text.index("activations") < text.index("weights, trained")
    assert "always" in text and "8192 tokens" in text and "3.00" in text


def _plan(monkeypatch: pytest.MonkeyPatch, answer: Any, *options: str) -> tuple[int, str, Any]:
    asked = []

    def ask(recipe: Any, world_size: int) -> Answer:
        asked.append((recipe.deepspeed.gpu_memory_gib, world_size))
        if isinstance(answer, str):
            raise NotPlanned(answer)
        return answer

    monkeypatch.setattr(memory, "ask", ask)
    result = CliRunner().invoke(cli.app, ["plan", "demo_connector", "--num-procs", "2", *options])
    return result.exit_code, result.output + str(result.exception or ""), asked


def test_a_plan_shows_memory_and_its_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fits = Answer("cpu", "cpu: 3.0 GiB of 80 GiB", PLAN, True)
    code, text, asked = _plan(monkeypatch, fits, "--gpu-memory", "h100")
    assert code == 0 and asked == [(80.0, 2)] and "# cpu: 3.0 GiB of 80 GiB" in text and "8192 tokens" in text
    code, text, _ = _plan(monkeypatch, fits, "--gpu-memory", "h100", "--json")
    assert code == 0 and '"peak_bytes": 3221225472' in text
    refused = Answer("cpu", "cpu would need 3.0 GiB of 2 GiB", PLAN, False, ("train.micro_batch=1",))
    code, text, _ = _plan(monkeypatch, refused, "--gpu-memory", "2")
    assert code == 1 and "does not fit into its GPU" in text and "train.micro_batch=1" in text
    code, text, _ = _plan(monkeypatch, "torch is missing", "--gpu-memory", "2")
    assert code == 0 and "# memory is not planned: torch is missing" in text
    sets = ("--accelerator", "cpu", "--set", "deepspeed.base=auto", "--set", "deepspeed.overrides={}")
    code, text, _ = _plan(monkeypatch, "torch is missing", "--gpu-memory", "2", *sets)
    assert code == 0 and "is not planned" not in text  # resolving has said so
    code, text, asked = _plan(monkeypatch, fits, "--gpu-memory", "")
    assert code == 1 and asked == [] and "--gpu-memory must be a size" in text  # an unset variable of a script
    code, text, asked = _plan(monkeypatch, fits)
    assert code == 0 and asked == [] and "memory" not in text  # ranks on CPUs, and no size named


def test_a_gpu_of_unknown_size_gets_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer("zero1", "zero1: 3.0 GiB", {**PLAN, "gpu_gib": None}, None)
    monkeypatch.setattr(memory, "detected_gib", lambda devices: 79.5)
    plan = type(
        "Plan", (), {"needs_gpus": True, "accelerator": "gpu", "hostfile": None, "world_size": 2, "own_hosts": HOSTS}
    )
    asked = []
    monkeypatch.setattr(memory, "ask", lambda recipe, size: asked.append(recipe.deepspeed.gpu_memory_gib) or answer)
    from pipeline.config.load import load_recipe
    from pipeline.config.resolve import resolve

    resolved = resolve(load_recipe("demo_connector"), 2)
    assert planned_memory(plan, resolved) == answer and asked == [79.5]
    plan.hostfile = Path("hosts")
    assert planned_memory(plan, resolved) == answer and asked == [79.5, None]


def test_a_launch_that_cannot_fit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from pipeline.config.load import load_recipe
    from pipeline.config.resolve import resolve

    monkeypatch.setattr(memory, "detected_gib", lambda devices: 2.0)
    plan: Any = type(
        "Plan", (), {"needs_gpus": True, "accelerator": "gpu", "hostfile": None, "world_size": 2, "own_hosts": HOSTS}
    )
    refused: Any = Answer("cpu", "cpu would need 3.0 GiB of 2 GiB", PLAN, False, ("train.micro_batch=1",))
    monkeypatch.setattr(memory, "ask", lambda recipe, size: refused)
    resolved = resolve(load_recipe("demo_connector"), 2)
    with pytest.raises(RecipeError, match="a rank of 2 does not fit into its GPU: cpu would need"):
        check_memory(plan, resolved)
    check_memory(plan, replace(resolved, zero_choice="chosen by the memory"))
    plan.hostfile = Path("hosts")
    check_memory(plan, resolved)
    plan.hostfile = None

    def no_torch(recipe: Any, size: int) -> Any:
        raise NotPlanned("no torch")

    monkeypatch.setattr(memory, "ask", no_torch)
    check_memory(plan, resolved)
    assert "memory is not planned: no torch" in caplog.text
