"""Ranks on the hosts of a hostfile: pdsh reaches all of them over ssh and starts DeepSpeed's launcher on each.

A hostfile that names this machine alone needs neither, and nor do hosts that each have a launcher (``--no-ssh``).
Variables of the plan show in the process lists of the hosts; secrets must not be there.
"""

from __future__ import annotations

import os
import socket

from launch.backends import Command
from launch.backends.node import node_command
from launch.carry import shell_line
from launch.plan import LaunchPlan
from pipeline.errors import RecipeError

# A host that does not answer at the start is given up, one that is lost later within a minute; nothing may ask for a
# password. The user's PDSH_SSH_ARGS_APPEND comes before these, and ssh takes the first.
_SSH_OPTIONS = "-o ServerAliveInterval=15 -o ServerAliveCountMax=3 -o ConnectTimeout=15 -o BatchMode=yes"
_LOST = r"^pdsh@[^ ]+: ([^ ]+): ssh exited with exit code 255$"  # ssh's own failure, not that of a rank
_LOOPBACK = ("localhost", "127.0.0.1")


def command(plan: LaunchPlan) -> Command:
    """pdsh with the line for every host, and how to signal the remote ranks."""
    if plan.hostfile is None:
        raise RecipeError("--backend deepspeed needs --hostfile; without hosts use --num-procs")
    names = [host.name for host in plan.hosts]
    if len(names) > 1 and any(name in _LOOPBACK for name in names):
        raise RecipeError(f"{plan.hostfile}: localhost cannot be reached by the other hosts; write this machine's name")
    node = node_command(plan, "critical")
    if plan.node_rank is not None:
        assert node.node_rank_at is not None
        before, after = node.argv[: node.node_rank_at], node.argv[node.node_rank_at :]
        return Command(argv=(*before, f"--node_rank={plan.node_rank}", *after), env=dict(node.env))
    if len(names) == 1 and is_this_machine(names[0]):
        return Command(argv=node.argv, env=dict(node.env))
    # all hosts at once: the others would wait for ranks that queue
    pdsh = ("pdsh", "-R", "ssh", "-S", "-f", str(len(names)), "-w", ",".join(names))
    # pdsh counts its hosts from 0 and replaces %n; %% becomes %
    line = shell_line(node).replace("%", "%%") + " --node_rank=%n"
    return Command(
        argv=(*pdsh, line),
        env={"PDSH_SSH_ARGS_APPEND": _ssh_arguments(plan)},
        arrives=node,
        remote=(*pdsh, "{command}"),
        percent_is_special=True,
        lost_host=_LOST,
    )


def is_this_machine(name: str) -> bool:
    """Whether a host name means this machine."""
    hostname = socket.gethostname()  # not the full name: that look-up can stall for a minute without DNS
    return name in {*_LOOPBACK, hostname} or name.partition(".")[0] == hostname.partition(".")[0]


def _ssh_arguments(plan: LaunchPlan) -> str:
    user_options = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    port = f"-p {plan.ssh_port}" if plan.ssh_port is not None else ""
    return " ".join(part for part in (user_options, port, _SSH_OPTIONS) if part)


__all__ = ["command", "is_this_machine"]
