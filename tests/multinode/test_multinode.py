"""Training over two simulated hosts through real ssh and pdsh: started as a user would, broken, started again."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from pipeline.config.load import load_recipe
from pipeline.config.source import parse_value
from pipeline.errors import EXIT_CLUSTER
from tests.jobs import rows
from tests.multinode.cluster import BIN, ENV, PAIR, STAGE, Cluster
from tests.multinode.hosts import ABSENT, PORT
from tests.source_tree import ROOT

pytestmark = pytest.mark.multinode


def test_deepspeed_as_a_user_would(cluster: Cluster, undisturbed: Path) -> None:
    (cluster.folder / "env").write_text("".join(f"{name}={value}\n" for name, value in ENV.items()))
    argv = [str(BIN / "deepspeed"), "--hostfile", cluster.hostfile(*PAIR), "--ssh_port", str(PORT)]
    argv += ["launch/train.py", f"demo_{STAGE}", *cluster.sets()]
    process = cluster.a.start(argv, cluster.folder / "log", ENV | {"DS_ENV_FILE": str(cluster.folder / "env")})
    code, output = cluster.finish(process)
    assert code == 0, output
    assert rows(cluster.run_dir) == rows(undisturbed)
    assert (cluster.run_dir / "logs" / "rank-1.log").is_file()


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
    argv += ["--run-dir", "run %h #2", "--max-restarts", "0"]  # ranks that say nothing else count as killed
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
