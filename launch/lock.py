"""One run per run directory: a lock file that names its holder; a dead holder loses it.

``run_dir/launch.lock`` holds host, pid and start. On the holder's system, its process is looked up by pid and start
time, because pids are reused. Other systems (another host that shares the storage, another container, the same host
before a reboot) cannot look it up, so the holder touches the file while it lives; its age is measured by the
storage's clock alone.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from launch.stop import forget_request
from pipeline.errors import RecipeError, StorageError

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
"""Twelve beats, and twice the time NFS may cache a file's time stamp."""
WITHOUT_LAUNCHER = "without launcher"
"""In place of a launch id: rank 0 holds the lock itself."""
_WRITING_SECONDS = 2.0  # from creating the lock file to writing it


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that runs in a run directory."""

    host: str
    pid: int
    started: str
    """Local time, to show."""
    system: str
    """Boot and pid namespace: two processes that share it can look up each other's pid."""
    process_start: str
    """When the process began, in the system's own units: setting the clock does not change it."""
    launch_id: str

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


@contextlib.contextmanager
def hold(run_dir: Path, launch_id: str, orphans: Callable[[str], None] = lambda launch_id: None) -> Iterator[None]:
    """Keep every other run out of the directory.

    Args:
        run_dir: the run's directory; created if missing.
        launch_id: this launch.
        orphans: ends the processes of a dead holder's launch; called with its launch id before the takeover.

    Raises:
        RecipeError: another run holds it.
        StorageError: the directory cannot be written.
    """
    path = run_dir / "launch.lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        me = _myself(launch_id)
        while not _create(path, me):
            _take_over(path, orphans)
    except OSError as error:
        raise StorageError(
            f"run directory {run_dir} cannot be locked: {error.filename or path} could not be written: "
            f"{error.strerror}; nothing was started. Free space, or choose another one with --run-dir"
        ) from error
    try:
        with keep_fresh(run_dir):
            yield
    finally:
        if (holder := _read(path)) is not None and holder.key == me.key:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold_as_rank(run_dir: Path, entered: Callable[[Path], None]) -> Iterator[None]:
    """`hold` by rank 0 of a job that `slt launch run` did not start; then calls ``entered`` with the directory."""
    with hold(run_dir, WITHOUT_LAUNCHER):
        forget_request(run_dir)
        entered(run_dir)
        yield


@contextlib.contextmanager
def keep_fresh(run_dir: Path) -> Iterator[None]:
    """Keep the lock of this process's launch fresh: ranks may outlive their launcher."""
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(run_dir / "launch.lock", stop), name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()


def look(run_dir: Path) -> tuple[str, float] | None:
    """The launch that holds a run directory (empty if that cannot be read), and for how many seconds it has shown no
    life: infinitely many if it is dead for sure. None if nobody holds it. Needs no right to write."""
    path = run_dir / "launch.lock"
    holder = _read(path)
    if holder is not None and holder.system == _system():
        alive = _process_start(holder.pid) == holder.process_start
        return holder.launch_id, 0.0 if alive else math.inf
    try:
        return holder.launch_id if holder else "", max(time.time() - path.stat().st_mtime, 0.0)
    except FileNotFoundError:
        return None


def _create(path: Path, me: Holder) -> bool:
    """Whether the lock is ours now; of several concurrent attempts one succeeds, also on NFS."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(me.key)
    except OSError:  # a full disk may take the name but not the content
        path.unlink()
        raise
    return True


def _take_over(path: Path, orphans: Callable[[str], None]) -> None:
    """Remove the lock of a dead holder.

    Raises:
        RecipeError: the holder is alive, or may be.
    """
    holder = _read(path)
    if holder is None:
        age = _age_seconds(path)
        if age is None:  # just released
            return
        if age < _WRITING_SECONDS:
            time.sleep(0.1)
            return
        if age < STALE_SECONDS:
            raise RecipeError(f"{path} cannot be read; if no run uses this directory, remove it")
    else:
        _refuse_if_alive(path, holder)
        log.info("%s: its holder (%s) is gone; taking over", path, holder)
        orphans(holder.launch_id)
    # another process may take over at the same time: check that the moved lock is the one judged above
    moved = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.rename(moved)
    except FileNotFoundError:
        return
    moved_holder = _read(moved)
    if moved_holder is not None and moved_holder != holder:
        _create(path, moved_holder)
    moved.unlink(missing_ok=True)


def _refuse_if_alive(path: Path, holder: Holder) -> None:
    if holder.system == _system():
        if _process_start(holder.pid) == holder.process_start:
            raise RecipeError(
                f"{path.parent} is in use by {holder} (launch {holder.launch_id}); two runs would overwrite each "
                "other's checkpoints. Wait for it, stop it, or choose another one with --run-dir"
            )
        return
    age = _age_seconds(path)
    if age is not None and age < STALE_SECONDS:
        raise RecipeError(
            f"{path.parent} is in use by {holder} (launch {holder.launch_id}), which was last seen alive"
            f" {age:.0f} s ago; two runs would overwrite each other's checkpoints. If that host is down, start again in"
            f" {STALE_SECONDS - age:.0f} s; else wait for it, stop it, or choose another one with --run-dir"
        )


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        log.debug("%s: %s", path, error)
        return None


def locked_at(run_dir: Path) -> float:
    """When the holder of a run directory last touched its lock; now if there is none."""
    try:
        return (run_dir / "launch.lock").stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _age_seconds(path: Path) -> float | None:
    """Seconds since the holder last touched the lock, by the storage's clock; None if the lock is gone."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        try:
            os.utime(path)
        except OSError as error:
            log.warning("%s: cannot touch the lock (%s); other hosts may take it over", path, error.strerror)


def _myself(launch_id: str) -> Holder:
    started = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    pid = os.getpid()
    return Holder(socket.gethostname(), pid, started, _system(), _process_start(pid), launch_id)


def _process_start(pid: int) -> str:
    """Start time of a process; empty if it is gone or a zombie."""
    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return ""
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists():
            return stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        return str(psutil.Process(pid).create_time())
    except (psutil.NoSuchProcess, OSError):
        return ""


def _system() -> str:
    """Equal for two processes if and only if a pid means the same process for both."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.getnode()} {int(time.time() - time.monotonic()) // 3600}"


__all__ = [
    "BEAT_SECONDS",
    "STALE_SECONDS",
    "WITHOUT_LAUNCHER",
    "Holder",
    "hold",
    "hold_as_rank",
    "keep_fresh",
    "locked_at",
    "look",
]
