from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import submit
from launch.cli import app
from launch.submit import SubmitOptions, batch_script
from pipeline.config import preflight
from pipeline.errors import ClusterError, RecipeError, StorageError

ALL = {
    "nodes": 2, "gpus_per_node": 8, "time": "24:00:00", "partition": "gpu", "account": "lab", "qos": "long",
    "constraint": "a100&ib", "mem": "0", "cpus_per_task": 12, "job_name": "my job", "signal_seconds": 120,
    "sbatch_arg": ["--exclusive", "--mail-type=END"], "sets": ["train.steps=20", "name='a b'"], "run_dir": "runs/it's",
}  # fmt: skip


@pytest.fixture(autouse=True)
def inputs_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "problems_here", lambda recipe: iter(()))


def script(**given: Any) -> str:
    return batch_script(SubmitOptions(recipe="demo_connector", **given), Path(given.get("run_dir") or "runs/x"), "demo")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["submit", "demo_connector", "--accelerator", "cpu", *arguments])


def test_the_script() -> None:
    text = script(**{**ALL, "run_dir": "runs/x 100%"})
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert lines == [
        '--job-name="my job"', "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=0",
        "--time=24:00:00", "--partition=gpu", "--account=lab", "--qos=long", '--constraint="a100&ib"', "--exclusive",
        "--mail-type=END", f"--chdir={Path.cwd()}", f'--output="{Path.cwd()}/runs/x 100%%/logs/slurm-%j.log"',
        "--open-mode=append", "--requeue", "--no-kill", "--signal=B:USR1@120",
    ]  # fmt: skip
    last = text.splitlines()[-1]
    expected = [str(Path(sys.executable).with_name("slt")), "launch", "run", "demo_connector", "--backend", "slurm"]
    expected += ["--set", "train.steps=20", "--set", "name='a b'", "--run-dir", "runs/x 100%", "--grace-seconds", "105"]
    assert last.startswith("exec ") and shlex.split(last)[1:] == expected


def test_a_small_job() -> None:
    text = script(tasks_per_node=2, max_requeues=3, accelerator="cpu", min_hosts=2, exclude_bad=True)
    assert "--ntasks-per-node=2\n" in text and "--gpus" not in text and "--time" not in text
    assert "--accelerator cpu --max-requeues 3 --min-hosts 2 --exclude-bad --num-procs 2 --grace-seconds 285" in text


def test_what_no_script_can_say() -> None:
    with pytest.raises(RecipeError, match=r"""'a"b' cannot be written into a batch script"""):
        script(job_name='a"b')
    with pytest.raises(RecipeError, match="--sbatch-arg exclusive: write it as --sbatch-arg=--name=value"):
        script(sbatch_arg=["exclusive"])
    for name in ("--num-procs 2", "--hostfile hosts", "--backend local", "--ssh-port 22"):
        with pytest.raises(RecipeError, match=f"{name.split()[0]} has no meaning for a job that SLURM places"):
            CliRunner().invoke(app, ["submit", "demo_connector", *name.split()], catch_exceptions=False)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = run("--nodes", "2", "--dry-run", "--run-dir", str(tmp_path / "run"))
    assert done.exit_code == 0 and done.stdout.startswith("#!/bin/bash\n") and not (tmp_path / "run").exists()
    bad = run("--nodes", "3", "--dry-run")
    assert isinstance(bad.exception, RecipeError) and "is not a multiple of" in str(bad.exception), "before it queues"


def test_it_submits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text('#!/bin/sh\nenv > "$0.env"; echo "$@" > "$0.argv"; echo "77;cluster"\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    done = run("--run-dir", str(tmp_path / "run"))
    assert done.exit_code == 0, done.exception
    path = tmp_path / "run" / "launch" / "submit.sbatch"
    assert (tmp_path / "sbatch.argv").read_text().split() == ["--parsable", str(path)] and path.is_file()
    variables = (tmp_path / "sbatch.env").read_text()
    assert "SLURM_CONF=x" in variables and "SLURM_JOB_ID" not in variables and "SBATCH_PARTITION" not in variables
    assert "job 77 submitted: 1 ranks on 1 nodes" in done.stdout and "squeue --job 77" in done.stdout
    assert f"slt launch stop {tmp_path}/run " in done.stdout and (tmp_path / "run" / "logs").is_dir()


def test_what_sbatch_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"sbatch cannot be started here: No such file or directory; .* is written"):
        submit.submit("text", tmp_path / "run")
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho invalid partition >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(ClusterError, match=r"sbatch refused .*submit.sbatch: invalid partition"):
        submit.submit("text", tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(
        StorageError, match=r"submit.sbatch could not be written: Not a directory; nothing was submitted"
    ):
        submit.submit("text", tmp_path / "file")
