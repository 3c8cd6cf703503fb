"""Errors of torch that come from the cluster and not from the program: a lost peer, or broken hardware.

torch raises most of them as a RuntimeError, so their texts decide. An error that names both (a watchdog's report of a
device that failed) is the hardware's. `device-side assert` and `illegal memory access` stay bugs: they come from code.
"""

from __future__ import annotations

from pipeline.errors import ClusterError, PeerLostError

_PEER_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
_PEER_TEXTS = (
    # gloo
    "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "No route to host",
    "Connection timed out", "Application timeout caused pair closure", "Socket Timeout", "socket timeout",
    "for recv operation to complete", "for send operation to complete", "Rank took too long",
    "connectFullMesh failed", "gloo::IoException",
    # the store where ranks meet
    "Connection was likely closed", "wait timeout after", "client socket has timed out", "failed to recv, got 0 bytes",
    # NCCL
    "ncclRemoteError", "ncclSystemError", "remote process exited or there was a network error",
    "Watchdog caught collective operation timeout", "unhandled system error", "NCCL communicator was aborted",
    # torch.distributed.monitored_barrier
    "monitoredBarrier",
)  # fmt: skip
_NOT_PEER_TEXTS = ("ncclInvalidArgument", "ncclInvalidUsage", "invalid usage", "invalid argument", "Duplicate GPU")
_HARDWARE_TEXTS = (
    "uncorrectable ECC error", "uncorrectable NVLink error", "unspecified launch failure", "hardware stack error",
    "CUDA error: unknown error", "CUDA-capable device(s) is/are busy or unavailable",
    "all CUDA-capable devices are busy or unavailable", "system not yet initialized", "GPU is lost",
    "fallen off the bus", "contained error",
)  # fmt: skip


def as_cluster_error(error: BaseException) -> ClusterError | None:
    """The same error as one of the cluster; None if it is none."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if any(words in text for words in _HARDWARE_TEXTS):
        return ClusterError(
            f"the GPU or its driver failed: {first}\nThis is most likely a fault of the hardware: look for Xid "
            "messages in the host's kernel log (dmesg), and leave the host out if it comes again (--exclude HOST)"
        )
    peer = type(error).__name__ in _PEER_TYPES or any(words in text for words in _PEER_TEXTS)
    if peer and not any(words in text for words in _NOT_PEER_TEXTS):
        return PeerLostError(
            f"another rank could not be reached: {first}\nThis is most likely a consequence: look at the first rank "
            "that failed. If none did, the network between the hosts is at fault"
        )
    return None


__all__ = ["as_cluster_error"]
