from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch import carry
from launch.arrive import main as arrive
from launch.carry import HostCommand, shell_line, shell_word
from pipeline.errors import RecipeError

# says in bytes what it got, whatever they mean
SAY = """
import json, os, sys
say = lambda text: os.fsencode(text).hex()
print(json.dumps([[say(a) for a in sys.argv[1:]], {say(k): say(v) for k, v in os.environ.items()}, say(os.getcwd())]))
"""
NASTY = [
    '{"a": "b"}', "x$HOME", "`id`", "$(id)", "%h %n %u %% %", "two\nlines\n", " blanks ", "\ttab", "it's", '"', "\\",
    "\\\\ \\n", "č\u0301 你好 \U0001f40c", "\udcff\udc80 no text", "", "*", "~", "#", "!!", "a;b|c&d>e<f", "\r",
    "\x07\x1b[0m", "=", "-", "\u2028",
]  # fmt: skip
WITHOUT_NUL = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from("\"'$`\\%\n ~*")
)


def arrived(
    command: HostCommand, shell: str, env: dict[str, str] | None = None
) -> tuple[list[str], dict[str, str], str]:
    """Arguments, variables and folder of a command after a remote shell; the host is the second."""
    line = shell_line(command) + (" --node_rank=1" if command.node_rank_at is not None else "")
    start = {"PATH": os.environ["PATH"], **(env or {})}
    done = subprocess.run([shell, "-c", line], env=start, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    argv, variables, folder = json.loads(done.stdout)
    back = lambda text: os.fsdecode(bytes.fromhex(text))  # noqa: E731
    return [back(text) for text in argv], {back(name): back(value) for name, value in variables.items()}, back(folder)


def saying(*arguments: str, **options: object) -> HostCommand:
    return HostCommand((sys.executable, "-S", "-E", "-c", SAY, *arguments), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_every_value_arrives_byte_for_byte(shell: str, tmp_path: Path) -> None:
    folder = tmp_path / "my work's 50% of $HOME `x`\n你"
    folder.mkdir()
    env = {f"V{number}": value for number, value in enumerate(NASTY)}
    argv, variables, where = arrived(saying(*NASTY, env=env, folder=folder), shell)
    assert argv == NASTY and where == variables["PWD"] == str(folder)
    assert {name: variables[name] for name in env} == env


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(WITHOUT_NUL, min_size=20, max_size=20))
def test_values_of_any_kind_arrive(texts: list[str]) -> None:
    env = {f"V{number}": value for number, value in enumerate(texts)}
    argv, variables, _ = arrived(saying(*texts, env=env), "sh")
    assert argv == texts and {name: variables[name] for name in env} == env


def test_an_interpreter_and_a_project_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / '50% o\'clock "$HOME" `id` \\ 你'
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    (folder / "arrive.py").write_text(carry.ARRIVE_SCRIPT.read_text())
    monkeypatch.setattr(carry.sys, "executable", str(folder / "python"))
    monkeypatch.setattr(carry, "ARRIVE_SCRIPT", folder / "arrive.py")
    assert arrived(saying("a b"), "sh")[0] == ["a b"]


def test_the_host_adds_its_number_and_keeps_its_own_variables() -> None:
    command = saying("first", "last", node_rank_at=6)
    argv, variables, _ = arrived(command, "sh", {"THERE": "1", "BOTH": "there"})
    assert argv == ["first", "--node_rank=1", "last"] and variables["THERE"] == "1"
    assert arrived(saying(env={"BOTH": "here"}), "sh", {"BOTH": "there"})[1]["BOTH"] == "here"


def test_what_cannot_arrive_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'a\\x00b' holds a NUL byte, which no argument, variable or path can"):
        shell_line(saying("a\0b"))
    with pytest.raises(RecipeError, match=r"'/a\\nb' cannot be named to other hosts: it holds a control character"):
        shell_word("/a\nb")


def test_a_command_that_cannot_start_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    parcel = shell_line(HostCommand(("/no/such",), folder=Path("/not/here"))).split()[-1]
    assert arrive([parcel]) == 3
    assert capsys.readouterr().err.startswith("cannot start /no/such in /not/here: [Errno 2] No such file")
