"""Ranks on the hosts of a hostfile: ``deepspeed --hostfile``, which reaches them by pdsh over ssh.

One-host hostfiles: DeepSpeed starts the ranks on *this* machine, whatever the host's name, unless told otherwise.
So a single host that is not this machine gets ``--force_multi``.

Environment: pdsh forwards nothing but PYTHON*, NCCL* and a few more. Variables of the plan are written to a file
that DeepSpeed reads (DS_ENV_FILE) and exports on every host. They appear in process lists; secrets must not be there.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys

from launch.backends import Command
from launch.hostfile import as_include
from launch.plan import LAUNCH_ID, LaunchPlan
from pipeline.errors import RecipeError

# A host that does not answer is given up at the start, one that is lost later within a minute; nothing may ask for a
# password. What the user sets in PDSH_SSH_ARGS_APPEND stands before these, and ssh takes the first.
_SSH_OPTIONS = "-o ServerAliveInterval=15 -o ServerAliveCountMax=3 -o ConnectTimeout=15 -o BatchMode=yes"
_LOST = r"^pdsh@[^ ]+: ([^ ]+): ssh exited with exit code 255$"  # ssh's own failure, not that of a rank
_LOOPBACK = ("localhost", "127.0.0.1")


def command(plan: LaunchPlan) -> Command:
    """``python -m deepspeed.launcher.runner --hostfile ...`` and how to signal the remote ranks."""
    if plan.hostfile is None:
        raise RecipeError("--backend deepspeed needs --hostfile; without hosts use --num-procs")
    names = [host.name for host in plan.hosts]
    if len(names) > 1 and any(name in _LOOPBACK for name in names):
        raise RecipeError(f"{plan.hostfile}: localhost cannot be reached by the other hosts; write this machine's name")
    remote = len(names) > 1 or not is_this_machine(names[0])
    argv = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(plan.hostfile)]
    argv += ["--include", as_include(plan.hosts)]
    argv += ["--master_addr", plan.master_addr, "--master_port", str(plan.master_port)]
    # DeepSpeed's own check ignores the ssh arguments of pdsh and asks one host only; launch/preflight.py asks all
    argv += ["--no_ssh_check", "--no_local_rank", "--log_level", "critical"]
    if not remote:
        argv += [str(plan.script), *plan.arguments]
        return Command(argv=tuple(argv), env={**plan.env, LAUNCH_ID: plan.launch_id})
    if len(names) == 1:
        argv.append("--force_multi")
    argv += [shlex.quote(str(plan.script)), *(pdsh_argument(argument) for argument in plan.arguments)]
    env_file = plan.run_dir.absolute() / "logs" / "launch.env"
    exported = {**plan.env, LAUNCH_ID: plan.launch_id}
    return Command(
        argv=tuple(argv),
        env={**plan.env, "DS_ENV_FILE": str(env_file), "PDSH_SSH_ARGS_APPEND": _ssh_arguments(plan)},
        files={env_file: "".join(f"{key}={value}\n" for key, value in sorted(exported.items()))},
        remote=("pdsh", "-R", "ssh", "-S", "-w", ",".join(names), "{command}"),
        lost_host=_LOST,
    )


def is_this_machine(name: str) -> bool:
    """Whether a host name means the machine this runs on."""
    hostname = socket.gethostname()  # not the full name: that look-up can stall for a minute without DNS
    return name in {*_LOOPBACK, hostname} or name.partition(".")[0] == hostname.partition(".")[0]


def pdsh_argument(text: str) -> str:
    """An argument as it must be given to DeepSpeed's pdsh runner to reach the script unchanged.

    pdsh hands one line to a remote shell. DeepSpeed wraps arguments with a space in double quotes (escaping only the
    quotes inside) and passes all others bare.

    Raises:
        RecipeError: the text holds ``%`` (pdsh's own placeholder) or a line break.
    """
    if "%" in text or "\n" in text:
        raise RecipeError(
            f"{text!r} cannot be passed to other hosts by pdsh (% or a line break); write it in the recipe"
        )
    if " " in text:
        for special in ("\\", "$", "`"):
            text = text.replace(special, f"\\{special}")
        return text
    return shlex.quote(text)


def _ssh_arguments(plan: LaunchPlan) -> str:
    given = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    port = f"-p {plan.ssh_port}" if plan.ssh_port is not None else ""
    return " ".join(part for part in (given, port, _SSH_OPTIONS) if part)


__all__ = ["command", "is_this_machine", "pdsh_argument"]
