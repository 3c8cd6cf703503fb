"""Errors of torch that come from the cluster, with texts as torch, gloo and NCCL write them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed

from pipeline.engine.faults import as_cluster_error
from pipeline.errors import ClusterError, PeerLostError

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] "
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, {}, NCCL version 2.27.5\n{}: {}\n"
    "Last error:\n"
)
CUDA = "CUDA error: {}\nCUDA kernel errors might be asynchronously reported at some other API call"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{GLOO}Connection closed by peer [10.77.0.2]:43917"),
        RuntimeError(f"{GLOO}Read error [10.77.0.2]:43917: Connection reset by peer"),
        RuntimeError(f"{GLOO}Application timeout caused pair closure"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"),  # noqa: E501
        RuntimeError("Gloo connectFullMesh failed with [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:144] no error"),  # noqa: E501
        RuntimeError("Rank 1 successfully reached monitoredBarrier, but received errors while waiting for send/recv from rank 0."),  # noqa: E501
        torch.distributed.DistBackendError(NCCL.format("remote process exited or there was a network error", "ncclRemoteError", "A call failed possibly due to a network error or a remote process exiting prematurely.")),  # noqa: E501
        torch.distributed.DistBackendError(NCCL.format("unhandled system error", "ncclSystemError", "System call (e.g. socket, malloc) or external library call failed or device error.")),  # noqa: E501
        torch.distributed.DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=88, OpType=ALLREDUCE, Timeout(ms)=1800000) ran for 1800012 milliseconds before timing out."),  # noqa: E501
        torch.distributed.DistNetworkError("failed to recv, got 0 bytes"),
        torch.distributed.DistStoreError("wait timeout after 1800000ms, keys: /0//cpu//0/rank_1"),
        RuntimeError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"),  # noqa: E501
    ],
)  # fmt: skip
def test_a_lost_peer_is_a_consequence(error: Exception) -> None:
    found = as_cluster_error(error)
    assert isinstance(found, PeerLostError) and found.exit_code == 3
    assert str(found).startswith(f"another rank could not be reached: {str(error).splitlines()[0]}\n")
    assert "most likely a consequence: look at the first rank that failed" in str(found)


@pytest.mark.parametrize(
    "text",
    [
        "uncorrectable ECC error encountered", "unspecified launch failure", "hardware stack error",
        "uncorrectable NVLink error detected during the execution", "unknown error",
        "CUDA-capable device(s) is/are busy or unavailable", "system not yet initialized",
    ],
)  # fmt: skip
def test_broken_hardware_is_named_as_such(text: str) -> None:
    for kind in {RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)}:
        try:
            error = kind(CUDA.format(text))
        except TypeError:  # cannot be made without a device
            continue
        found = as_cluster_error(error)
        assert isinstance(found, ClusterError) and not isinstance(found, PeerLostError)
        assert str(found).startswith(f"the GPU or its driver failed: CUDA error: {text}\n")
        assert "fault of the hardware: look for Xid messages" in str(found) and "--exclude HOST" in str(found)


def test_a_watchdog_that_reports_a_broken_device() -> None:
    text = "[Rank 3] Process group watchdog thread terminated with exception: CUDA error: uncorrectable ECC error encountered"  # noqa: E501
    found = as_cluster_error(torch.distributed.DistBackendError(text))
    assert found is not None and not isinstance(found, PeerLostError)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(CUDA.format("device-side assert triggered")),
        RuntimeError(CUDA.format("an illegal memory access was encountered")),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"),
        torch.distributed.DistBackendError(NCCL.format("invalid usage (run with NCCL_DEBUG=WARN for details)", "ncclInvalidUsage", "This usually reflects invalid usage of NCCL library.")),  # noqa: E501
        ValueError("Connection closed by peer"),
        ConnectionResetError(104, "Connection reset by peer"),
        RuntimeError(""),
    ],
)  # fmt: skip
def test_bugs_stay_bugs(error: Exception) -> None:
    assert as_cluster_error(error) is None
