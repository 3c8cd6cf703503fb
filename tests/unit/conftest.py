"""A command's or a rank's main sets logging up for its process; in tests the process goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

OURS = ("", "shards", "pipeline", "launch")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Handlers of a rank write to streams that are closed when the test ends; levels would decide what others print."""
    root = logging.getLogger()
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in OURS}
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
