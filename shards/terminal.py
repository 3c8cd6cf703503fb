"""Where tables are printed: a terminal has a width, a file or a pipe has none."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

_NO_LIMIT = 10_000


def table_console(**settings: Any) -> Console:
    """A console on stdout that fits tables to the terminal, and prints them in full width where there is none.

    Rich assumes 80 columns for files and pipes and then shortens or drops what does not fit.
    """
    return Console(width=None if sys.stdout.isatty() else _NO_LIMIT, **settings)
