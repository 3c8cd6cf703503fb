"""Every stage in bf16 as `slt train` runs it, under ZeRO 1, 2 and 3 at world size 1, against the same run on
the CPU; a kill in the middle and a resume; the export against the live model; generation.

Later stages read the exports of the CPU's run, on both sides: so their losses can be compared. Runs share the device:
nothing here is timed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.rows import ROOT, Probe, run_section, world

STAGES = ("continued_pretraining", "contrastive", "connector")
FIRST_STEP_TOLERANCE = 0.02
"""Relative difference of the first loss between CPU and CUDA, from the same weights: bf16 has eight bits, and each side
rounds in its own order."""
LOSS_TOLERANCE = {"continued_pretraining": 0.03, "contrastive": 0.15, "connector": 0.03}
"""The largest of all steps; grows with every step, fastest where the loss falls fastest (ZeRO-2 and ZeRO-3 on one CPU
are 2 % apart after three contrastive steps in bf16, 1e-7 in fp32)."""
RESUME_TOLERANCE = 0.01
"""Between an interrupted and an uninterrupted run on one device: equal but for sums that CUDA orders as it likes."""

LLM = "{tiny: {width: 128, layers: 2, heads: 2, feed_forward: 256, max_positions: 512}, tokenizer: TOKENIZER}"
VISUAL = (
    "{backbone: {tiny: {width: 64, layers: 2, heads: 2, feed_forward: 128, patch_pixels: 16}, train: full, pool: mean},"
    " width: 64, max_frames: 128, word: {layers: 2, window_frames: 8, stride: 4, heads: 2},"
    " sentence: {layers: 1, heads: 2}}"
)


class RunFailedError(Exception):
    """A command ended badly; carries the end of what it said."""


@dataclass(frozen=True)
class Commands:
    """Runs our modules as processes of their own, on the CPU or on the device."""

    probe: Probe
    data: Path

    def environment(self, cpu: bool) -> dict[str, str]:
        hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if cpu or self.probe.dry else {}
        threads = {"OMP_NUM_THREADS": "1" if self.probe.dry else "2"}
        return {**os.environ, "HF_HUB_OFFLINE": "1", **threads, **hidden}

    def start(self, arguments: list[str], cpu: bool, log: Path) -> subprocess.Popen[bytes]:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", *arguments], cwd=ROOT, env=self.environment(cpu),
                stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def finish(self, arguments: list[str], cpu: bool, log: Path) -> str:
        """Run to the end; returns the output, or raises with its last lines."""
        code = self.start(arguments, cpu, log).wait()
        said = log.read_text(encoding="utf-8", errors="replace")
        if code:
            raise RunFailedError(f"{' '.join(arguments[:2])} ended with {code}: {_last_line(said)}\n{said[-2500:]}")
        return said


def _last_line(said: str) -> str:
    """The line that most likely names the cause."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or line.startswith("error")]
    return (named or lines or [""])[-1][:160]


@dataclass(frozen=True)
class Job:
    """One stage under one ZeRO stage: ``zero`` 0 is the reference on the CPU."""

    commands: Commands
    stage: str
    zero: int
    steps: int

    @property
    def folder(self) -> Path:
        return self.commands.probe.work / "runs" / (f"zero{self.zero}" if self.zero else "reference") / self.stage

    @property
    def export(self) -> Path:
        return self.folder / "export"

    def sets(self, run_dir: Path) -> list[str]:
        data, reference = self.commands.data, self.commands.probe.work / "runs" / "reference"
        shards = data / "shards" / ("text" if self.stage == STAGES[0] else "video")
        base, overrides = f"zero{self.zero}", "{}"
        if not self.zero or self.commands.probe.dry:
            base, overrides = "cpu", f"{{zero_optimization: {{stage: {self.zero or 2}}}}}"
        models = {
            "continued_pretraining": [
                f"model.llm={LLM.replace('TOKENIZER', str(data / 'tokenizer'))}", "data.block_tokens=128"
            ],
            "contrastive": [
                f"model.visual={VISUAL}", f"model.text_encoder.path={reference / STAGES[0] / 'export'}",
                "contrastive.embed=64",
            ],
            "connector": [
                f"model.llm.path={reference / STAGES[0] / 'export'}",
                f"model.visual.path={reference / STAGES[1] / 'export'}", "connector.max_new_tokens=6",
                "connector.eval_samples=4",
            ],
        }[self.stage]  # fmt: skip
        return [
            f"run_dir={run_dir}", f"data.train=[{{shards: {shards}}}]", f"data.eval=[{{shards: {shards}, split: dev}}]",
            "data.workers=0", "train.global_batch=8", "train.micro_batch=4",
            "train.world_sizes=[1]", "train.precision=bf16", f"train.steps={self.steps}", "train.log_every_steps=1",
            "train.eval_every_steps=0", "train.tensorboard=false", "train.optimizer.warmup_steps=2",
            "train.optimizer.lr=0.0003",
            f"train.checkpoint={{every_steps: {self.steps // 2}, keep: 5}}",
            f"deepspeed.base={base}", f"deepspeed.overrides={overrides}", *models,
        ]  # fmt: skip

    def command(self, run_dir: Path) -> list[str]:
        options = [part for value in self.sets(run_dir) for part in ("--set", value)]
        return ["benchmarks.gpu.train", f"demo_{self.stage}", *options]

    def train(self) -> list[float]:
        """Without interruption; the loss of every step."""
        cpu = self.zero == 0
        self.commands.finish(self.command(self.folder), cpu, self.folder.with_suffix(".log"))
        return losses(self.folder)

    def train_killed_and_resumed(self) -> list[float]:
        """SIGKILL as soon as the checkpoint in the middle is complete, then the same command again."""
        run_dir = self.folder.with_name(self.stage + "-killed")
        log = run_dir.with_suffix(".log")
        process = self.commands.start(self.command(run_dir), False, log)
        complete = run_dir / "checkpoints" / f"step-{self.steps // 2:06d}" / "COMPLETE"
        while not complete.is_file():
            if process.poll() is not None:
                raise RunFailedError(f"ended before the kill: {_last_line(log.read_text())}\n{log.read_text()[-2500:]}")
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.commands.finish(self.command(run_dir), False, run_dir.with_name(self.stage + "-resumed.log"))
        return losses(run_dir)

    def write_export(self) -> dict[str, str]:
        """Exported and compared with the live model's outputs; the largest difference per output."""
        arguments = ["launch", "export", str(self.folder), "--which", "latest", "--out", str(self.export)]
        said = self.commands.finish(arguments, True, self.folder.with_name(self.stage + "-export.log"))
        marker = ": largest difference to the live model "
        return dict(line.split(marker) for line in said.splitlines() if marker in line)


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def difference(found: list[float], expected: list[float]) -> float:
    """Largest relative difference; infinite where a step is missing or no number."""
    if len(found) != len(expected) or any(value != value for value in (*found, *expected)):
        return float("inf")
    return max(abs(mine - other) / abs(other) for mine, other in zip(found, expected, strict=True))


def attempt(probe: Probe, name: str, work: Callable[[], object]) -> None:
    """A row instead of an exception: one failure must not hide the others."""
    try:
        work()
    except RunFailedError as error:
        first, _, said = str(error).partition("\n")
        probe.add(name, False, first[:200], text=said)


def check_on_device(probe: Probe, job: Job, reference: Future[list[float]], thorough: bool) -> None:
    """All that is asked of one stage under one ZeRO stage."""
    title = f"{job.stage} zero{job.zero}"
    asked = ["losses", *(["killed, resumed", "export"] if thorough else [])]
    if all(probe.known(f"{title} {name}") for name in asked):
        return
    whole: list[float] = []

    def train() -> None:
        whole.extend(job.train())
        expected = reference.result()
        first, worst = difference(whole[:1], expected[:1]), difference(whole, expected)
        allowed = LOSS_TOLERANCE[job.stage]
        detail = {"allowed": [FIRST_STEP_TOLERANCE, allowed], "losses": whole, "cpu": expected}
        good = first <= FIRST_STEP_TOLERANCE and worst <= allowed
        probe.add(f"{title} losses", good, f"first step {first:.1e}, all {worst:.1e}", "rel", **detail)

    def resume() -> None:
        resumed = job.train_killed_and_resumed()
        worst = difference(resumed, whole)
        probe.add(f"{title} killed, resumed", worst <= RESUME_TOLERANCE, worst, "rel", bit_equal=resumed == whole)

    def export() -> None:
        found = job.write_export()
        probe.add(f"{title} export", bool(found), ", ".join(f"{n} {v}" for n, v in found.items()), "abs")

    attempt(probe, f"{title} losses", train)
    if whole and thorough:
        attempt(probe, f"{title} killed, resumed", resume)
        attempt(probe, f"{title} export", export)


def check_generation(probe: Probe, commands: Commands, llm: Path, llava: Path) -> None:
    """The exported models generate on the device: the LLM's greedy tokens in float32 are the CPU's."""
    import torch
    from transformers import AutoModelForCausalLM

    ids_BL = torch.tensor([[1, 40, 77, 130, 9]])
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    texts = []
    for device in ("cpu", probe.device):
        found = model.to(device).generate(ids_BL.to(device), max_new_tokens=12, do_sample=False, pad_token_id=0)
        texts.append(found.cpu().tolist())
    probe.add("LLM greedy tokens equal the CPU's", texts[0] == texts[1], str(texts[1][0][5:]))

    def translate() -> None:
        arguments = ["launch", "evaluate", str(llava), "--split", "test"]
        arguments += ["--shards", str(commands.data / "shards" / "video")]
        arguments += ["--set", "max_samples=4", "--set", "num_beams=2", "--set", "max_new_tokens=8", "--json"]
        said = commands.finish(arguments, False, probe.work / "runs" / "evaluate.log")
        scores = json.loads(said[said.index("{") :])
        probe.add("slt evaluate", scores["samples"] == 4, scores["bleu4"], "BLEU-4")

    attempt(probe, "slt evaluate", translate)


def run(probe: Probe) -> None:
    """Full: nine runs, those under ZeRO-3 in every respect. Dry: every stage once, all respects on the last one."""
    commands = Commands(probe, world(probe))
    steps, zeros = (4, (3,)) if probe.dry else (12, (3, 1, 2))
    cores = len(os.sched_getaffinity(0))
    pool = ThreadPoolExecutor(max(2, min(cores // 2, 8)))
    checks = []
    for stage in STAGES:
        reference = Job(commands, stage, 0, steps)
        trained = pool.submit(reference.train)
        for zero in zeros:
            thorough = zero == 3 if not probe.dry else stage == STAGES[-1]
            checks.append(pool.submit(check_on_device, probe, Job(commands, stage, zero, steps), trained, thorough))
        if stage != STAGES[-1]:  # what the next stage reads
            attempt(
                probe, f"{stage} on the CPU", lambda job=reference, done=trained: done.result() and job.write_export()
            )
    for check in checks:
        check.result()
    connector = Job(commands, STAGES[-1], zeros[0], steps)
    check_generation(probe, commands, Job(commands, STAGES[0], 0, steps).export, connector.export)


if __name__ == "__main__":
    run_section("stages", run)
