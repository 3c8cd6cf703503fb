"""Environment variables of our processes that must be set before libraries are imported."""

from __future__ import annotations

import os

_DEFAULTS = {
    # one bar per loaded file and rank drowns the run's own output; our own progress stays
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # tokenizers warn about every fork after use; loader workers tokenise one text at a time anyway
    "TOKENIZERS_PARALLELISM": "false",
}


def set_defaults() -> None:
    """Set the variables that the user has not set."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
