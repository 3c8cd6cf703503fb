"""Starts ranks as forks of a process that has imported torch, DeepSpeed and transformers: five CPU seconds less each.

A test process has one server (`rank_server`), which ends with it. A fork gets exactly the environment, output, folder
and session that a new process would get, and is signalled, waited for and killed by its own pid.

    python -m tests.rank_server SOCKET      # stdin: closed when the test process ends
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.source_tree import ROOT

_PRELOADED = (
    "torch", "torch.distributed", "deepspeed", "transformers", "transformers.models.llama.modeling_llama",
    "transformers.models.vit.modeling_vit", "pipeline.engine.run", "pipeline.engine.observers.registry",
    "pipeline.stages.continued_pretraining", "pipeline.stages.contrastive", "pipeline.stages.connector",
)  # fmt: skip
_ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # read when torch and DeepSpeed are imported


class Rank:
    """A fork of the server; the part of `subprocess.Popen` that tests use."""

    def __init__(self, connection: socket.socket, output: Path | None) -> None:
        self._connection, self._output = connection, output
        self._received = b""
        self.returncode: int | None = None
        self.pid = int(json.loads(self._line())["pid"])

    def fileno(self) -> int:
        """Readable once it has ended."""
        return self._connection.fileno()

    def poll(self) -> int | None:
        """Exit code, -N for signal N; None while it runs."""
        return self._wait(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """All that it wrote, once it has ended."""
        self.wait(timeout)
        return (self._output.read_text(errors="replace") if self._output else ""), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                status = json.loads(self._line())["status"]
            except (BlockingIOError, TimeoutError):
                return None
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def _line(self) -> bytes:
        while b"\n" not in self._received:
            more = self._connection.recv(4096)
            assert more, "the server of ranks has ended"
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line


class RankServer:
    """The server of this test process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="slt-rank-server-")
        self._address = str(Path(self._folder.name) / "socket")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.rank_server", self._address],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, **_ENV},
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "the server of ranks did not start"
        self._started = 0
        atexit.register(self.close)

    def start(self, script: Path, arguments: Sequence[str], env: dict[str, str], capture: bool = True) -> Rank:
        """Run a script in a fork, in a session of its own; with ``capture`` its output goes to a file."""
        self._started += 1
        output = Path(self._folder.name) / f"output-{self._started}" if capture else None
        request = {"script": str(script), "arguments": list(arguments), "env": env, "output": output and str(output)}
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Rank(connection, output)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


@functools.cache
def rank_server() -> RankServer:
    """Started when the first rank is."""
    return RankServer()


class _Server:
    """The loop of the server process; single-threaded, because it forks."""

    def __init__(self, address: str) -> None:
        self.selector = selectors.DefaultSelector()
        self.running: dict[int, socket.socket] = {}
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        self.woken, self.waker = socket.socketpair()
        self.woken.setblocking(False)
        self.waker.setblocking(False)
        for file in (self.listener, self.woken, sys.stdin):
            self.selector.register(file, selectors.EVENT_READ)

    def __enter__(self) -> Self:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.waker.fileno())
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)

    def serve(self) -> None:
        """Until the test process closes our stdin."""
        while True:
            ready = [key.fileobj for key, _ in self.selector.select()]
            if sys.stdin in ready:
                return
            if self.woken in ready:
                self.woken.recv(4096)
                self.reap()
            if self.listener in ready:
                self.start(self.listener.accept()[0])

    def reap(self) -> None:
        while self.running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with self.running.pop(pid) as connection:
                try:
                    connection.sendall(json.dumps({"status": status}).encode() + b"\n")
                except BrokenPipeError:
                    continue  # nobody waits for it

    def start(self, connection: socket.socket) -> None:
        request = json.loads(connection.makefile("rb").readline())
        pid = os.fork()
        if pid == 0:
            self.become(request)
        self.running[pid] = connection
        connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")

    def become(self, request: dict[str, Any]) -> None:
        """In the fork: what a new process finds when it starts. Does not return."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            os.environ.clear()
            os.environ.update(request["env"])
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, 0)
            target = request["output"]
            output = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if target else nothing
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.closerange(3, 256)
            sys.stdin = open(0)  # noqa: SIM115
            sys.argv = [request["script"], *request["arguments"]]
            sys.path.insert(0, str(Path(request["script"]).parent))
            atexit._clear()
            code = _code_of(request["script"])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _code_of(script: str) -> int:
    """Run a script as Python would; its exit code."""
    try:
        runpy.run_path(script, run_name="__main__")
        code: Any = 0
    except SystemExit as error:
        code = error.code
    atexit._run_exitfuncs()
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
    return code if isinstance(code, int) else 0 if code is None else 1


def main() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    with _Server(sys.argv[1]) as server:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        server.serve()


if __name__ == "__main__":
    main()
