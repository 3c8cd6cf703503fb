"""A plan whose hosts have passed every check before the start; without the unfit ones, if the user wants that."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

from launch.health import check_health, health_level
from launch.memory import check_memory
from launch.preflight import UnfitHostsError, check_hosts
from launch.prepare import Prepared, prepare_again
from launch.run_options import RunOptions
from pipeline.errors import RecipeError

log = logging.getLogger(__name__)


def ready(prepared: Prepared, options: RunOptions) -> Prepared:
    """The launch on hosts that have passed: the same, or with ``--exclude-bad`` one on the hosts that remain.

    Args:
        prepared: the launch as it was planned, on all hosts of the options.
        options: the command line.

    Raises:
        UnfitHostsError: hosts cannot take part, and may not be left out.
        TooFewHostsError: those that remain are fewer than ``--min-hosts``, or do not fit the batch.
        RecipeError: the recipe does not fit into the GPUs, or the command itself is wrong.
    """
    if options.exclude_bad and prepared.plan.node_rank is not None:
        raise RecipeError("--exclude-bad needs one launcher that reaches all hosts; here each has its own")
    without: set[str] = set()
    while True:
        plan = prepared.plan
        try:
            with ThreadPoolExecutor(1) as pool:  # the planner imports torch meanwhile
                memory = pool.submit(check_memory, plan, prepared.resolved)
                check_hosts(prepared.command, plan, prepared.resolved.recipe)
                memory.result()
            check_health(prepared.command, plan, health_level(options.health, plan))
            return prepared
        except UnfitHostsError as unfit:
            if not options.exclude_bad or len(plan.hosts) == len(unfit.hosts):
                raise
            without |= set(unfit.hosts)
            prepared = prepare_again(options, prepared, without, options.min_hosts)
            plan = prepared.plan
            log.warning("%s\n--exclude-bad: going on with %d ranks on %s", unfit, plan.world_size, plan.where)


__all__ = ["ready"]
