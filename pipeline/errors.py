"""User-facing errors and the exit code each one ends the process with.

0 ok, 1 our bug, 2 user error, 3 cluster, 4 data, 5 diverged, 6 damaged checkpoint, 75 preempted and saved,
130 interrupted.
"""

from __future__ import annotations

import signal

from shards.errors import DataError

EXIT_OK, EXIT_BUG, EXIT_USER, EXIT_CLUSTER, EXIT_DATA, EXIT_DIVERGED = 0, 1, 2, 3, 4, 5
EXIT_DAMAGED = 6
EXIT_PREEMPTED, EXIT_INTERRUPTED = 75, 130


class SltError(Exception):
    """Base of the errors a user can cause or fix; shown as one paragraph, without a traceback."""

    exit_code = EXIT_BUG


class RecipeError(SltError):
    """A recipe or option that cannot be run; lists every problem found."""

    exit_code = EXIT_USER


class CheckpointError(SltError):
    """A checkpoint or export that is missing, incomplete, cannot be written or is from another experiment."""

    exit_code = EXIT_USER


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's bytes differ from those written; neither recipe nor option is the cause."""

    exit_code = EXIT_DAMAGED


class ForeignCheckpointError(CheckpointError):
    """A checkpoint of another format version: complete, but for another release."""


class StorageError(SltError):
    """A file of the run that cannot be written (full disk, permissions); names the file."""

    exit_code = EXIT_USER


class OutOfMemoryError(SltError):
    """A rank that needs more memory than it has: the recipe decides, so a restart would end alike."""

    exit_code = EXIT_USER


class ClusterError(SltError):
    """A host, rank or launcher that failed; names the host."""

    exit_code = EXIT_CLUSTER


class PeerLostError(ClusterError):
    """The connection to another rank broke or timed out: most likely a consequence of that rank's end."""


class DivergedError(SltError):
    """Training produced non-finite numbers for too long."""

    exit_code = EXIT_DIVERGED


__all__ = [
    "CheckpointError",
    "ClusterError",
    "DamagedCheckpointError",
    "DataError",
    "DivergedError",
    "ForeignCheckpointError",
    "OutOfMemoryError",
    "PeerLostError",
    "RecipeError",
    "SltError",
    "StorageError",
]


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that ask a run to stop. SIGHUP, sent when a terminal closes, is left out if already ignored: the run was
    started to outlive the terminal (nohup)."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *hangup)
