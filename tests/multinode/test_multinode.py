"""Training over two simulated hosts through real ssh and pdsh: started as a user would, broken, started again."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.load import load_recipe
from pipeline.config.source import parse_value
from pipeline.errors import EXIT_CLUSTER, EXIT_PREEMPTED
from tests.jobs import World, rows, run_job
from tests.multinode.cluster import BIN, ENV, PAIR, SAVE, SIGTERM_BIT, STAGE, STEPS, Cluster, pending_signals
from tests.multinode.hosts import ABSENT, PORT, SimulatedHost, until
from tests.source_tree import ROOT

pytestmark = pytest.mark.multinode


@pytest.fixture
def cluster(hosts: tuple[SimulatedHost, SimulatedHost], corpus: World, tmp_path: Path) -> Iterator[Cluster]:
    yield Cluster(hosts, corpus, tmp_path)
    for host in hosts:
        host.clear()


@pytest.fixture(scope="session")
def local(hosts: object, corpus: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses per step of two ranks on one host."""
    run_dir = tmp_path_factory.mktemp("local")
    run_job(STAGE, corpus.sets(STAGE, run_dir, 2, train__steps=STEPS), 2)
    return rows(run_dir)


def test_deepspeed_as_a_user_would(cluster: Cluster, local: dict[int, float]) -> None:
    (cluster.folder / "env").write_text("".join(f"{name}={value}\n" for name, value in ENV.items()))
    argv = [str(BIN / "deepspeed"), "--hostfile", cluster.hostfile(*PAIR), "--ssh_port", str(PORT)]
    argv += ["launch/train.py", f"demo_{STAGE}", *cluster.sets()]
    process = cluster.a.start(argv, cluster.folder / "log", ENV | {"DS_ENV_FILE": str(cluster.folder / "env")})
    code, output = cluster.finish(process)
    assert code == 0, output
    assert rows(cluster.run_dir) == local


def test_slt_launch_stopped_and_continued(cluster: Cluster, local: dict[int, float]) -> None:
    """SIGTERM at the launcher reaches the ranks on both hosts, which save; the same command goes on from there."""
    process = cluster.slt(**SAVE)
    rank = cluster.in_training(process)
    rank.suspend()  # so that training cannot end before the signal arrives
    cluster.launcher().terminate()
    until(lambda: SIGTERM_BIT & pending_signals(rank), 60, "SIGTERM reaches rank 1 on host-b")
    rank.resume()
    code, output = cluster.finish(process)
    assert code == EXIT_PREEMPTED, output
    assert 2 <= max(rows(cluster.run_dir)) < STEPS, "the signal came too late"
    code, output = cluster.finish(cluster.slt(**SAVE))
    assert code == 0 and "launch finished (exit code 0)" in output, output
    assert rows(cluster.run_dir) == local
    assert (cluster.run_dir / "logs" / "rank-1.log").is_file()


def test_a_rank_killed_on_the_other_host(cluster: Cluster, local: dict[int, float]) -> None:
    """The launch ends by itself; the same command resumes and ends with the losses of an undisturbed run."""
    process = cluster.slt(**SAVE)
    cluster.in_training(process).kill()
    code, output = cluster.finish(process, seconds=60)
    assert code == 128 + signal.SIGKILL and "rank 1 on host-b: no report; it was killed" in output, output
    assert max(rows(cluster.run_dir)) < STEPS, "the kill came too late"
    code, output = cluster.finish(cluster.slt(**SAVE))
    assert code == 0 and "at step" in output, output
    assert rows(cluster.run_dir) == local


def test_a_host_that_drops_off_the_network(cluster: Cluster) -> None:
    """Nobody closes its connections, so only ssh's keepalive notices; the other host's rank must not wait for it."""
    process = cluster.slt(env={"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=1 -o ServerAliveCountMax=3"}, **SAVE)
    cluster.in_training(process)
    with cluster.b.unplugged():
        code = process.wait(timeout=60)
        left = cluster.a.processes()
    assert code == EXIT_CLUSTER and "host-b: connection lost" in cluster.output(), cluster.output()
    assert not left


NASTY = {
    "A": '{"a": "b"}', "B": "x$HOME `id` $(id)", "C": "%h %n %u %% 50%", "D": "two\nlines\n", "E": " blanks \t",
    "F": "it's \"quoted\" \\ \\\\n", "G": "č 你好 \U0001f40c", "H": "", "I": "*;|&<>#!~", "NCCL_X": '$HOME "%h"',
    "HF_HOME": "/a b/$x/`id`",
}  # fmt: skip
# ends without training: what arrived is in the environment of the rank, its arguments and its folder
SAY = """
import json, os, sys
said = {"env": dict(os.environ), "argv": sys.argv[1:], "folder": os.getcwd(), "python": sys.executable}
open(f"said-{os.environ['RANK']}", "w").write(json.dumps(said))
"""


def test_values_arrive_byte_for_byte_on_every_host(cluster: Cluster, tmp_path: Path) -> None:
    """Exports, carried variables, .deepspeed_env, settings, run directory, folder and interpreter, all at once."""
    folder = tmp_path / 'my work\'s $HOME `id` 50% \\ "你"'
    (folder / "bin").mkdir(parents=True)
    # a virtual environment under a name that no shell leaves alone
    (folder / "pyvenv.cfg").write_text((BIN.parent / "pyvenv.cfg").read_text())
    (folder / "lib").symlink_to(BIN.parent / "lib")
    (folder / "bin" / "python").symlink_to((BIN / "python").resolve())
    (folder / "say.py").write_text(SAY)
    (folder / ".deepspeed_env").write_text('MINE= $HOME "%h" `id` \n')
    carried = {name: NASTY[name] for name in ("NCCL_X", "HF_HOME")}
    sets = ["connector.prompt='{video} \"%h\" $HOME `id` \\ '"]
    program = (
        "from pathlib import Path; from launch import cli, options; options.check_recipe = lambda loaded, sizes: None; "
        f"options.TRAIN_SCRIPT = Path({str(folder / 'say.py')!r}); cli.main()"
    )
    argv = [
        str(folder / "bin" / "python"),
        "-c",
        program,
        "run",
        "demo_connector",
        "--hostfile",
        cluster.hostfile(*PAIR),
    ]
    argv += ["--ssh-port", str(PORT), *(part for text in sets for part in ("--set", text))]
    argv += ["--run-dir", "run %h #2"]
    argv += [part for name in NASTY.keys() - carried.keys() for part in ("--export", f"{name}={NASTY[name]}")]
    env = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **carried}
    process = subprocess.Popen(
        cluster.a.inside("env", *(f"{name}={value}" for name, value in env.items()), *argv, cwd=folder),
        stdin=subprocess.DEVNULL, stdout=(cluster.folder / "log").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    cluster.finish(process, seconds=60)
    assert (folder / "run %h #2" / "logs" / "launch.log").is_file(), cluster.output()
    for rank in (0, 1):
        assert (folder / f"said-{rank}").is_file(), cluster.output()
        said = json.loads((folder / f"said-{rank}").read_text())
        assert {name: said["env"].get(name) for name in NASTY} == NASTY
        assert said["env"]["MINE"] == ' $HOME "%h" `id` ' and said["env"]["RANK"] == str(rank)
        recipe = Path(said["argv"][0])
        assert said["argv"][1:] == ["--sha256", hashlib.sha256(recipe.read_bytes()).hexdigest()]
        assert load_recipe(recipe).connector.prompt == parse_value(sets[0].partition("=")[2])
        assert recipe.parent == folder / "run %h #2" and load_recipe(recipe).run_dir == "run %h #2"
        assert said["folder"] == str(folder) and said["python"] == str(folder / "bin" / "python")


def test_an_unreachable_host(cluster: Cluster) -> None:
    code, output = cluster.finish(cluster.slt("host-a", ABSENT), seconds=40)
    assert code == EXIT_CLUSTER, output
    assert "1 of 2 hosts cannot take part" in output and f"{ABSENT}: ssh: connect to host {ABSENT}" in output
    assert "Traceback" not in output and not (cluster.run_dir / "logs" / "launch.log").exists()
