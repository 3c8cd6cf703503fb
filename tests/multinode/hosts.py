"""Simulated hosts on one machine: own network, processes, mounts and host name each; real sshd, one shared file system.

A rack holds the switch they are plugged into, and the disks that are mounted on all of them. Hosts can be switched off
and on again, unplugged, and given a small disk.

The namespaces have no name and no file holds them open: when a host's first process dies the kernel ends all others of
that host and takes its network with it. That process dies with its parent, so nothing outlives the tests, however they
end. Own process namespaces also matter for safety: DeepSpeed's pdsh runner calls ``pkill -f`` on its hosts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.source_tree import ROOT

TOOLS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter", "setpriv")
PORT = 2222
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMES = ("host-a", "host-b", "host-c")
ABSENT = "host-d"
"""In everybody's /etc/hosts, but it does not exist."""
ADDRESSES = {name: f"10.77.0.{number}" for number, name in enumerate((*NAMES, ABSENT), start=1)}
_UNSHARE = ("unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")
# Mounts of the rack appear on the hosts, those of a host stay there.
_RACK = ("unshare", "--mount", "--net", "--propagation", "shared")
_HOST = (*_UNSHARE, "--propagation", "slave")
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
_SWITCH = """
set -e
ip link add switch type bridge
ip link set switch up
echo ready
exec sleep infinity
"""
# $1 host name, $2 folder with hosts, shadow and ssh, which only this host's mount namespace sees in /etc.
# Logins read no .bashrc: with one that runs `pyenv init`, two at once wait for each other up to a minute.
_FIRST_PROCESS = """
set -e
hostname "$1"
ip link set lo up
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/shadow" /etc/shadow
mount --bind "$2/ssh" /etc/ssh
mount -t tmpfs tmpfs /run
mkdir /run/sshd
if [ -e ~root/.bashrc ]; then mount --bind /dev/null ~root/.bashrc; fi
exec "$3" -D -e
"""


@dataclass(frozen=True)
class Rack:
    """What the hosts share."""

    folder: Path
    pid: int

    def run(self, *argv: str) -> None:
        """On the switch."""
        _run("nsenter", "--target", str(self.pid), "--mount", "--net", *argv)

    @contextlib.contextmanager
    def small_disk(self, folder: Path, mib: int) -> Iterator[None]:
        """A disk of this size, mounted on all hosts; here it is seen through `SimulatedHost.sees`."""
        self.run("mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder))
        try:
            yield
        finally:
            self.run("umount", "--lazy", str(folder))


@dataclass
class SimulatedHost:
    """One host. Not plugged in before `switch_on`."""

    name: str
    rack: Rack
    process: subprocess.Popen[bytes] | None = None
    pid: int = 0
    """Its first process as seen from outside."""

    @property
    def address(self) -> str:
        return ADDRESSES[self.name]

    def switch_on(self) -> None:
        """Start it and plug it in. Does nothing if it runs."""
        if self.process is not None:
            return
        log = self.rack.folder / f"{self.name}.log"
        self.process = _start(self.name, self.rack, log)
        self.pid = _first_process(self.process, log)
        _connect(self)

    def switch_off(self) -> None:
        """Power is gone: everything on it ends at once, and nobody is told."""
        if self.process is not None:
            _stop(self.process)
            self.process = None

    def sees(self, path: Path) -> Path:
        """The same file as this host sees it, for the test to read: the host may have mounted something there."""
        return Path(f"/proc/{self.pid}/root{path}")

    def inside(self, *argv: str, cwd: Path = ROOT) -> list[str]:
        """The command that runs ``argv`` on this host."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--uts", "--net", "--pid"]
        return [*enter, "env", f"--chdir={cwd}", *argv]

    def start(self, argv: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
        """As a user who has just logged in: no variable of the test's own environment is there."""
        login = {"PATH": _PATH, "HOME": str(Path.home()), "LANG": "C.UTF-8"}
        with log.open("wb") as sink:
            return subprocess.Popen(
                self.inside(*argv), env={**login, **env}, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
            )

    def processes(self) -> list[psutil.Process]:
        """All that runs here, except the sshd that waits for connections; nothing where it is switched off."""
        if self.process is None:
            return []
        return [process for process in psutil.process_iter() if process.pid != self.pid and self._is_here(process)]

    def rank(self, number: int) -> psutil.Process | None:
        """The process of that rank of a launch, if it runs here."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(number) and "--sha256" in process.cmdline():
                    return process
        return None

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        """Off the network: nothing arrives and nobody is told."""
        _run(*self.inside("ip", "link", "set", "eth0", "down"))
        try:
            yield
        finally:
            _run(*self.inside("ip", "link", "set", "eth0", "up"))

    def clear(self) -> None:
        """Kill whatever a failed test left."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _is_here(self, process: psutil.Process) -> bool:
        try:
            return os.readlink(f"/proc/{process.pid}/ns/pid") == os.readlink(f"/proc/{self.pid}/ns/pid")
        except OSError:  # gone
            return False


def why_not() -> str:
    """The reason this machine cannot simulate hosts, or nothing."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_PATH) is None]
    if missing:
        return f"needs {', '.join(missing)} (apt-get install iproute2 openssh-server pdsh)"
    mount = ["mount", "-t", "tmpfs", "tmpfs", "/run"]
    done = subprocess.run([*_UNSHARE, *mount], env={"PATH": _PATH}, capture_output=True, text=True, check=False)
    return f"this machine allows no namespaces: {done.stderr.strip()}" if done.returncode else ""


@contextlib.contextmanager
def three_hosts(folder: Path) -> Iterator[tuple[SimulatedHost, SimulatedHost, SimulatedHost]]:
    """``NAMES`` on one switch, able to log in on each other and on themselves by key.

    A host's own name resolves to 127.0.1.1 on itself, as Debian and Ubuntu install it: the trap in which gloo announces
    an address nobody else can reach.
    """
    for name in NAMES:
        _etc(folder / name, name, folder / "key")
    with contextlib.ExitStack() as stack:
        switch = subprocess.Popen(
            [*_DIES_WITH_US, *_RACK, "sh", "-c", _SWITCH],
            env={"PATH": _PATH}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip
        stack.enter_context(switch)
        stack.callback(switch.kill)
        assert switch.stdout is not None and switch.stdout.readline() == b"ready\n", "the switch did not start"
        a, b, c = (SimulatedHost(name, Rack(folder, switch.pid)) for name in NAMES)
        for host in (a, b, c):
            stack.callback(host.switch_off)
            host.switch_on()
        for host in (b, c):
            _run(*a.inside("ssh", "-p", str(PORT), "-o", "ConnectTimeout=10", host.name, "true"))
        yield a, b, c


def until(condition: Callable[[], object], seconds: float, what: str, every: float = 0.1) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(every)


def _etc(folder: Path, name: str, key: Path) -> None:
    ssh = folder / "ssh"
    ssh.mkdir(parents=True)
    if not key.exists():
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    # one key serves as host key and as user key: both ends are this test
    public = key.with_suffix(".pub").read_text()
    (ssh / "ssh_known_hosts").write_text("".join(f"[{known}]:{PORT} {public}" for known in ADDRESSES))
    (ssh / "authorized_keys").write_text(public)
    (ssh / "ssh_config").write_text(f"IdentityFile {key}\nStrictHostKeyChecking yes\n")
    (ssh / "sshd_config").write_text(
        f"Port {PORT}\nHostKey {key}\nAuthorizedKeysFile /etc/ssh/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nMaxStartups 100\n"
    )
    lines = [f"{address} {host}" for host, address in ADDRESSES.items() if host != name]
    # the own name twice: the first line is what a look-up of it returns here
    lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}", *lines]
    (folder / "hosts").write_text("".join(f"{line}\n" for line in lines))
    (folder / "shadow").write_text("root:*:1::::::\n")  # without PAM sshd refuses the locked root of some images


def _start(name: str, rack: Rack, log: Path) -> subprocess.Popen[bytes]:
    sshd = shutil.which("sshd", path=_PATH)
    assert sshd is not None
    enter = ["nsenter", "--target", str(rack.pid), "--mount"]
    argv = [*_DIES_WITH_US, *enter, *_HOST, "sh", "-c", _FIRST_PROCESS, name, name, str(rack.folder / name), sshd]
    with log.open("wb") as sink:
        return subprocess.Popen(argv, env={"PATH": _PATH}, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the first process of the host, whose parent waits for it until the kernel has ended all others."""
    for first in psutil.Process(process.pid).children() or [process]:
        first.kill()
    process.wait(timeout=20)


def _first_process(process: subprocess.Popen[bytes], log: Path) -> int:
    """The pid of sshd, once it listens."""
    until(lambda: process.poll() is not None or "listening" in log.read_text(), 20, f"sshd starts\n{log.read_text()}")
    assert process.poll() is None, f"the host ended at once:\n{log.read_text()}"
    (child,) = psutil.Process(process.pid).children()
    return child.pid


def _connect(host: SimulatedHost) -> None:
    port, number = f"to-{host.name}", host.address.rpartition(".")[2]
    # the same card every time: the others remember its address for a while
    card = ["eth0", "address", f"02:00:0a:4d:00:{int(number):02x}", "netns", str(host.pid)]
    host.rack.run("ip", "link", "add", port, "type", "veth", "peer", "name", *card)
    host.rack.run("ip", "link", "set", port, "master", "switch", "up")
    _run(*host.inside("ip", "addr", "add", f"{host.address}/24", "dev", "eth0"))
    _run(*host.inside("ip", "link", "set", "eth0", "up"))


def _run(*argv: str) -> None:
    done = subprocess.run(argv, env={**os.environ, "PATH": _PATH}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
